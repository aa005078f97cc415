# SPDX-License-Identifier: Apache-2.0
"""The order of cells: a bijection for every size, epochs that differ, blocks, weights; shares that are even."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megacell.core.errors import UsageError
from megacell.store.sampling.cell_set import CellSet
from megacell.store.sampling.order import BlockShuffled, Weighted, balanced, global_batch, permuted, some_of
from megacell.store.sampling.sharing import micro_batches, share_out


@given(n=st.integers(1, 5000), seed=st.integers(0, 2**64 - 1), epoch=st.integers(0, 2**33))
def test_the_permutation_is_a_bijection_of_every_size(n, seed, epoch):
    assert np.array_equal(np.sort(permuted(np.arange(n), n, seed, epoch)), np.arange(n))


@given(n=st.integers(1, 2**62), data=st.data())
def test_any_position_of_a_huge_epoch_is_found_at_once(n, data):
    positions = data.draw(st.lists(st.integers(0, n - 1), min_size=1, max_size=50, unique=True))
    places = permuted(np.array(positions), n, 3, 1)
    assert len(set(places.tolist())) == len(positions)
    assert places.min() >= 0
    assert places.max() < n
    assert [permuted(np.array([p]), n, 3, 1)[0] for p in positions[:3]] == places[:3].tolist()


def test_epochs_and_seeds_give_unrelated_orders():
    n, positions = 4096, np.arange(4096)
    orders = [positions, permuted(positions, n, 0, 0), permuted(positions, n, 0, 1), permuted(positions, n, 1, 0)]
    for i, one in enumerate(orders):
        for other in orders[i + 1 :]:
            assert abs(np.corrcoef(one, other)[0, 1]) < 0.08  # five standard deviations
            assert (one == other).sum() < 12  # one is expected


def test_small_sizes_reach_every_order():
    seen = {tuple(permuted(np.arange(4), 4, seed, 0)) for seed in range(500)}
    assert len(seen) == 24


@given(n=st.integers(1, 60), size=st.integers(1, 25), seed=st.integers(0, 9))
def test_batches_go_through_each_epoch_once_and_run_on_into_the_next(n, size, seed):
    steps = -(-3 * n // size)
    which, epochs = (
        np.concatenate(x) for x in zip(*(global_batch(k, size, n, seed) for k in range(steps)), strict=True)
    )
    for epoch in range(3):
        assert np.array_equal(epochs[epoch * n : (epoch + 1) * n], np.full(n, epoch))
        assert np.array_equal(which[epoch * n : (epoch + 1) * n], permuted(np.arange(n), n, seed, epoch))


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


def share_of_neighbours_alike(which, labels):
    """How often two cells in a row have one label, beside how often two of all cells have."""
    seen = labels[which]
    by_chance = (np.bincount(labels) / len(labels)) @ (np.bincount(labels) / len(labels))
    return (seen[1:] == seen[:-1]).mean() / by_chance


def test_cells_that_are_sorted_are_mixed_the_better_the_more_blocks_are_shuffled_together():
    n, labels = 10_000, np.repeat(np.arange(20), 500)
    epochs = [global_batch(0, n, n, 0, BlockShuffled(64, blocks))[0] for blocks in (1, 8, 157)]
    alike = [share_of_neighbours_alike(which, labels) for which in epochs]
    assert share_of_neighbours_alike(np.arange(n), labels) > 19
    assert alike == sorted(alike, reverse=True)
    assert alike[0] > 15
    assert alike[1] < 5
    assert alike[2] == pytest.approx(1, abs=0.22)  # five standard deviations
    mixing = [BlockShuffled(64, blocks).mixing for blocks in (1, 8, 157)]
    assert mixing == sorted(mixing)
    assert (mixing[0], mixing[2]) == (0, pytest.approx(1, abs=0.01))


def test_block_shuffled_orders_differ_by_seed_and_epoch():
    order = BlockShuffled(16, 8)
    (one, other), third = (
        np.split(global_batch(0, 2000, 1000, 3, order)[0], 2),
        global_batch(0, 1000, 1000, 4, order)[0],
    )
    for a, b in ((one, other), (one, third)):
        assert (a == b).sum() < 20  # one is expected


@pytest.mark.parametrize("wrong", [(0, 4), (4, 0)])
def test_blocks_that_cannot_be_meant_are_refused(wrong):
    with pytest.raises(UsageError, match="give 1 or more of both"):
        BlockShuffled(*wrong)


def test_some_of_the_cells_are_drawn_in_their_order():
    cells = np.arange(0, 300, 3)
    drawn = some_of(cells, 20, seed=1)
    assert len(drawn) == 20
    assert np.isin(drawn, cells).all()
    assert (np.diff(drawn) > 0).all()
    assert np.array_equal(some_of(cells, 20, seed=1), drawn)
    assert not np.array_equal(some_of(cells, 20, seed=2), drawn)
    assert np.array_equal(some_of(cells, 100, seed=1), cells)


class TestBalanced:
    """Each value of a column as often as every other."""

    @pytest.fixture
    def store(self, made_up):
        donors = ["a"] * 200 + ["b"] * 60 + ["c"] * 30 + [None] * 10
        return made_up(np.arange(300)[:, None] + [[1, 2]], donors=donors)

    def test_groups_come_equally_often(self, store):
        order, line = balanced(store, "donor_id", CellSet.of(np.ones(300, bool)))
        which, _ = global_batch(0, 40_000, 300, 5, order)
        shares = [np.isin(which, group).mean() for group in (range(200), range(200, 260), range(260, 290))]
        assert shares == pytest.approx([0.25] * 3, abs=0.0125)  # five standard deviations
        assert "4 groups (the 10 without a value are one) of 10 to 200 cells" in line

    def test_one_value_is_nothing_to_balance(self, store):
        with pytest.raises(UsageError, match="have one value"):
            balanced(store, "donor_id", CellSet.of(np.arange(300) < 200))


LENGTHS = st.lists(st.integers(1, 4096), min_size=1, max_size=200)


@given(lengths=LENGTHS, bins=st.integers(1, 16))
def test_shares_are_as_even_as_the_longest_cell_allows(lengths, bins):
    load = np.bincount(share_out(np.array(lengths), bins), weights=lengths, minlength=bins)
    assert load.max() - load.min() <= max(lengths)
    assert (load > 0).sum() == min(bins, len(lengths))


def test_shares_follow_the_longest_first_rule():
    assert share_out(np.array([3, 9, 3, 5, 3]), 2).tolist() == [1, 0, 1, 1, 0]  # 9 + 3 against 5 + 3 + 3


def test_sixty_four_ranks_differ_by_less_than_two_percent():
    lengths = np.clip(np.random.default_rng(0).lognormal(7, 0.6, 2048), 50, 2048).astype(int)
    load = np.bincount(share_out(lengths, 64), weights=lengths)
    assert load.max() / load.mean() < 1.02


@given(lengths=LENGTHS, budget=st.integers(4096, 40_000))
def test_micro_batches_hold_every_cell_once_within_the_budget(lengths, budget):
    parts = micro_batches(np.array(lengths), budget)
    assert sorted(np.concatenate(parts).tolist()) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in part) <= budget for part in parts)
    assert all(len(part) and (np.diff(part) > 0).all() for part in parts)


@pytest.mark.parametrize(("lengths", "parts"), [([5] * 8, 4), ([5] * 7, 4), ([6, 6, 6], 3), ([], 0)])
def test_micro_batches_are_as_few_as_fit(lengths, parts):
    assert len(micro_batches(np.array(lengths, int), 10)) == parts
