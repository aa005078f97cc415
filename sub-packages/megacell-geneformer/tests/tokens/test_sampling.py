# SPDX-License-Identifier: Apache-2.0
"""Which cells come when: chosen by metadata, in blocks, by weight; the same at any step, without an array of them."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from megacell.core.errors import DataError, UsageError
from megacell.geneformer.tokens.lengths import token_lengths
from megacell.store.sampling import cell_set as cell_sets
from megacell.store.sampling.batch_stream import BatchStream
from megacell.store.sampling.cell_set import CellSet, choose_cells
from megacell.store.sampling.order import BlockShuffled, Shuffled, Weighted, global_batch


class TestCellSet:
    """A bitmap that is indexed like an array."""

    @given(mask=arrays(bool, st.integers(1, 3000), elements=st.booleans()), data=st.data())
    def test_it_holds_the_cells_of_its_mask(self, mask, data):
        cells, expected = CellSet.of(mask), np.flatnonzero(mask)
        assert len(cells) == len(expected)
        assert np.array_equal(cells[:], expected)
        places = data.draw(st.lists(st.integers(0, max(len(expected) - 1, 0)), max_size=20)) if len(expected) else []
        assert cells[np.array(places, int)].tolist() == expected[places].tolist()
        lengths = data.draw(arrays(np.uint16, len(mask), elements=st.integers(0, 2)))
        assert np.array_equal(cells.having(lengths)[:], np.flatnonzero(mask & (lengths > 0)))

    def test_a_place_beyond_its_end_is_refused(self):
        with pytest.raises(IndexError, match="outside the 2 cells"):
            CellSet.of(np.array([True, False, True]))[np.array([2])]

    def test_lengths_are_looked_at_part_by_part(self, monkeypatch):
        monkeypatch.setattr(cell_sets, "CELLS_AT_ONCE", 64)
        mask, lengths = np.arange(1000) % 3 > 0, np.arange(1000) % 5
        assert np.array_equal(CellSet.of(mask).having(lengths)[:], np.flatnonzero(mask & (lengths > 0)))


@pytest.fixture
def store(made_up):
    """300 cells of 20 genes: donors a (200), b (60), c (30), without (10); two sources."""
    rng = np.random.default_rng(0)
    donors = ["a"] * 200 + ["b"] * 60 + ["c"] * 30 + [None] * 10
    return made_up(rng.poisson(1.0, (300, 20)) + 1, donors=donors, sources=["x"] * 150 + ["y"] * 150)


class TestChoosing:
    """Cells by their metadata."""

    def test_values_are_taken_in_and_left_out(self, store):
        chosen = choose_cells(store, 'source == "y"', exclude={"donor_id": ["a", "c"]})
        assert chosen[:].tolist() == [*range(200, 260), *range(290, 300)]

    def test_the_choice_is_mapped_from_the_cache_the_second_time(self, store, cache, monkeypatch):
        first = choose_cells(store, exclude={"donor_id": ["a"]})[:]
        monkeypatch.setattr(store, "obs_slice", None)
        again = choose_cells(store, exclude={"donor_id": ["a"]})
        assert isinstance(again.bits, np.memmap)
        assert np.array_equal(again[:], first)

    def test_a_value_that_no_cell_has_is_refused(self, store):
        with pytest.raises(UsageError, match="no cell has 'd' in obs column donor_id"):
            choose_cells(store, exclude={"donor_id": ["d"]})

    def test_a_choice_of_nothing_is_refused(self, store):
        with pytest.raises(DataError, match="no cell is left"):
            choose_cells(store, "source == 'x' and donor_id == 'c'")

    @pytest.mark.parametrize(
        ("choice", "message"),
        [
            ({"exclude": {"colour": ["red"]}}, "no obs column 'colour'; there are source, donor_id"),
            ({"where": "colour == 'red'"}, "name 'colour' is not defined.*columns are source, donor_id"),
            ({"where": "donor_id"}, "is no condition on cells"),
        ],
        ids=["a column to exclude", "a column of the query", "a query that is none"],
    )
    def test_a_choice_that_cannot_be_meant_is_refused(self, choice, message, store):
        with pytest.raises(UsageError, match=message):
            choose_cells(store, **choice)

    def test_a_stream_over_a_set_is_that_over_the_array(self, store, vocabulary_for):
        vocabulary = vocabulary_for(20)
        lengths = token_lengths(store, vocabulary)
        chosen = choose_cells(store, exclude={"donor_id": ["a"]})
        settings = {"max_length": 30, "global_batch": 16, "token_budget": 300, "seed": 1}
        streams = [BatchStream(store, vocabulary, cells, lengths, **settings) for cells in (chosen, chosen[:])]
        for k in (0, 9):
            one, other = (stream.step(k) for stream in streams)
            assert [b.tokens.tolist() for b in one] == [b.tokens.tolist() for b in other]


@given(
    n=st.integers(1, 700), block=st.integers(1, 40), blocks=st.integers(1, 12), size=st.integers(1, 90),
    seed=st.integers(0, 9),
)  # fmt: skip
def test_block_shuffled_epochs_hold_every_cell_once_at_any_batch_size(n, block, blocks, size, seed):
    order = BlockShuffled(block, blocks)
    drawn = [global_batch(k, size, n, seed, order) for k in range(-(-2 * n // size))]
    which, epochs = (np.concatenate(part) for part in zip(*drawn, strict=True))
    for epoch in range(2):
        assert np.array_equal(np.sort(which[epoch * n : (epoch + 1) * n]), np.arange(n))
        assert (epochs[epoch * n : (epoch + 1) * n] == epoch).all()


def test_a_window_of_blocks_mixes_as_it_says():
    order, n, size = BlockShuffled(block=16, blocks=32), 512 * 40, 512
    assert order.mixing == pytest.approx(1 - 15 / 511)
    same, pairs = 0, 0
    for k in range(40):
        which, _ = global_batch(k, size, n, 3, order)
        blocks = np.unique(which // 16)
        assert len(blocks) == 32  # one window is 32 blocks
        order_seen = which // 16
        same += (order_seen[1:] == order_seen[:-1]).sum()
        pairs += size - 1
    assert same / pairs == pytest.approx(1 - order.mixing, abs=0.006)  # five standard deviations
    assert not np.array_equal(global_batch(0, size, n, 3, order)[0], global_batch(40, size, n, 3, order)[0])


class TestWeights:
    """Drawing with replacement."""

    def test_groups_come_as_often_as_their_weights_say(self):
        groups = np.repeat([0, 1, 2, -1], [1000, 100, 10, 50])
        order = Weighted(groups, np.array([1.0, 1.0, 2.0]))
        which, _ = global_batch(0, 40_000, len(groups), 5, order)
        share = np.bincount(groups[which], minlength=3) / 40_000
        assert share == pytest.approx([0.25, 0.25, 0.5], abs=0.0125)  # five standard deviations
        times = np.bincount(which[groups[which] == 1], minlength=1100)[1000:]
        assert times.min() > 40  # a hundred each are expected

    def test_a_step_is_the_same_however_it_is_reached(self):
        order = Weighted(np.arange(50) % 3)
        long = global_batch(0, 60, 50, 1, order)[0]
        assert np.array_equal(np.concatenate([global_batch(k, 10, 50, 1, order)[0] for k in range(6)]), long)
        assert not np.array_equal(global_batch(0, 60, 50, 2, order)[0], long)

    def test_groups_of_other_cells_are_refused(self):
        with pytest.raises(UsageError, match="groups of 3 cells for a stream of 4"):
            global_batch(0, 2, 4, 0, Weighted(np.array([0, 1, 0])))

    @pytest.mark.parametrize("weights", [[1.0], [1.0, -1.0], [0.0, 0.0], [1.0, np.nan]])
    def test_weights_that_cannot_be_meant_are_refused(self, weights):
        with pytest.raises(UsageError, match="order"):
            Weighted(np.array([0, 1]), np.array(weights))


@pytest.mark.parametrize(
    "order", [Shuffled(), BlockShuffled(8, 4), Weighted(np.arange(300) % 7)], ids=lambda order: type(order).__name__
)
def test_every_order_gives_the_same_cells_for_any_number_of_ranks(order, store, vocabulary_for):
    vocabulary = vocabulary_for(20)
    lengths = token_lengths(store, vocabulary)
    settings = {"max_length": 30, "global_batch": 32, "token_budget": 300, "seed": 1, "order": order}

    def cells_at(k, ranks):
        streams = [
            BatchStream(store, vocabulary, np.arange(300), lengths, rank=r, ranks=ranks, **settings)
            for r in range(ranks)
        ]
        return sorted(c for s in streams for b in s.step(k) for c in b.cells.tolist())

    for k in (0, 11):
        assert cells_at(k, 1) == cells_at(k, 3) == cells_at(k, 8)


class TestState:
    """What is kept for going on."""

    @pytest.fixture
    def stream(self, store, vocabulary_for):
        vocabulary = vocabulary_for(20)
        lengths = token_lengths(store, vocabulary)

        def make(**changes):
            given = {"max_length": 30, "global_batch": 32, "token_budget": 300, "seed": 1, **changes}
            return BatchStream(store, vocabulary, np.arange(300), lengths, **given)

        return make

    def test_it_is_a_few_numbers_and_leads_back_to_the_step(self, stream, store):
        state = stream().state_dict(17)
        assert state["generation"] == store.generation
        assert stream(ranks=4, token_budget=900).step_of(state) == 17

    @pytest.mark.parametrize("change", [{"seed": 2}, {"global_batch": 16}])
    def test_another_stream_refuses_it(self, change, stream):
        with pytest.raises(UsageError, match=next(iter(change))):
            stream(**change).step_of(stream().state_dict(17))

    def test_evenness_is_that_of_the_batches(self, stream):
        imbalance, fill = stream(ranks=4, multiple_of=8).evenness(3)
        batches = [stream(rank=r, ranks=4, multiple_of=8).step(3) for r in range(4)]
        tokens = [sum(b.n_tokens for b in share) for share in batches]
        assert imbalance == pytest.approx(max(tokens) / np.mean(tokens) - 1)
        assert fill == pytest.approx(sum(tokens) / sum(len(b.tokens) for share in batches for b in share))
