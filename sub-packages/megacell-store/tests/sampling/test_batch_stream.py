# SPDX-License-Identifier: Apache-2.0
"""The stream: the same cells with the same random numbers for any number of ranks, at any step, in any thread."""

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import pytest

from megacell.core.errors import DataError, UsageError
from megacell.core.rng import philox_words
from megacell.store.sampling import batch_stream as module
from megacell.store.sampling.batch_stream import BatchStream
from megacell.store.sampling.cell_set import CellSet
from megacell.store.sampling.order import BlockShuffled, Shuffled, Weighted

ORDERS = [Shuffled(), BlockShuffled(8, 4), Weighted(np.arange(190) % 7)]
MULTIPLE = 8


@dataclass
class SumBatch:
    """The sum of each cell's counts, and a random number of its key's."""

    cells: np.ndarray
    sums: np.ndarray
    drawn: list[int]
    n_tokens: int

    @property
    def n_items(self) -> int:
        return len(self.cells)


class SumCollator:
    """A cell costs one, and one for each of its genes; at most 40."""

    max_cost, multiple_of, needed = 40, MULTIPLE, "a count in this store"

    def costs(self, lengths):
        return np.minimum(np.asarray(lengths, np.int64) + 1, self.max_cost)

    def make(self, reader, cells, keys, first, costs):
        indptr, _, counts = reader.gather(cells)
        if not np.array_equal(self.costs(np.diff(indptr)), costs):
            raise DataError("not the lengths that were recorded")
        sums = np.array([counts[a:z].sum() for a, z in pairwise(indptr)])
        drawn = [
            int(philox_words(np.array([cell, 0, 0, 0], np.uint32), key)[0])
            for cell, key in zip(cells.tolist(), keys, strict=True)
        ]
        return [SumBatch(cells[a:z], sums[a:z], drawn[a:z], int(costs[a:z].sum())) for a, z in pairwise(first.tolist())]


@pytest.fixture
def store(made_up):
    """200 cells of 60 genes, every twentieth without any."""
    rng = np.random.default_rng(0)
    counts = rng.poisson(0.7, (200, 60)) * rng.integers(1, 9, (200, 60))
    counts[:, 0] = 1
    counts[::20] = 0
    return made_up(counts)


@pytest.fixture
def lengths(store):
    return np.diff(store.matrix.indptr).astype(np.uint16)


@pytest.fixture
def stream(store, lengths):
    """Make a stream over the 190 cells of the store that have a count."""

    def make(**changes):
        settings = {"global_batch": 16, "cost_budget": 150, "seed": 3, **changes}
        cells, of = settings.pop("cells", np.arange(200)), settings.pop("lengths", lengths)
        return BatchStream(store, cells, of, SumCollator(), **settings)

    return make


def cells_in(batches):
    """What each cell of some micro-batches came as: number, sum, random number; in order."""
    return [cell for b in batches for cell in zip(b.cells.tolist(), b.sums.tolist(), b.drawn, strict=True)]


@pytest.mark.parametrize("order", ORDERS, ids=lambda order: type(order).__name__)
@pytest.mark.parametrize("ranks", [2, 3, 8])
def test_ranks_share_out_the_same_cells_with_the_same_random_numbers(ranks, order, stream):
    for k in (0, 7, 40):
        alone = stream(order=order).step(k)
        shares = [stream(order=order, rank=rank, ranks=ranks).step(k) for rank in range(ranks)]
        assert sorted(cell for share in shares for cell in cells_in(share)) == sorted(cells_in(alone))
        assert len(cells_in(alone)) == 16
        assert all(share and all(len(batch.cells) for batch in share) for share in shares)
        costs = [sum(batch.n_tokens for batch in share) for share in shares]
        assert max(costs) - min(costs) <= 40


@pytest.mark.parametrize("order", ORDERS, ids=lambda order: type(order).__name__)
@pytest.mark.parametrize("threads", [0, 1, 4])
def test_a_step_is_the_same_whenever_and_wherever_it_is_made(threads, order, stream):
    in_a_row = [cells_in(stream(order=order).step(k)) for k in range(16)]  # into the second epoch of twelve steps
    made = stream(order=order)
    assert [cells_in(made.step(k)) for k in reversed(range(16))] == in_a_row[::-1]
    for first in (0, 5, 15, 16):
        with stream(order=order).prefetched(first, 16, threads=threads, depth=2) as ahead:
            assert [cells_in(batches) for batches in ahead] == in_a_row[first:]


def test_micro_batches_stay_within_the_budget_and_are_few(stream):
    for k in range(12):
        parts = stream().step(k)
        costs = [batch.n_tokens for batch in parts]
        assert max(costs) <= 150
        assert -(-sum(costs) // 150) <= len(parts) <= -(-sum(costs) // 150) + 2
    assert sorted(cells_in(stream(cost_budget=1000).step(3))) == sorted(cells_in(stream().step(3)))
    assert len(stream(cost_budget=1000).step(3)) == 1


def test_however_many_are_made_at_once_they_are_the_same(stream, monkeypatch):
    expected = [cells_in([batch]) for batch in stream().step(5)]
    assert len(expected) > 2
    monkeypatch.setattr(module, "COST_AT_ONCE", 200)
    assert [cells_in([batch]) for batch in stream().step(5)] == expected


def test_every_epoch_sees_each_cell_once_with_new_random_numbers(stream):
    drawn = {}
    for k in range(36):
        for cell, _, number in cells_in(stream().step(k)):
            drawn.setdefault(cell, []).append(number)
    assert len(drawn) == 190
    assert {len(numbers) for numbers in drawn.values()} <= {3, 4}  # 36 steps of 16 are three epochs and six cells
    assert all(len(set(numbers)) == len(numbers) for numbers in drawn.values())


def test_a_cell_that_is_drawn_often_has_new_random_numbers_each_time(stream):
    drawn = {}
    for k in range(40):
        for cell, _, number in cells_in(stream(order=ORDERS[2]).step(k)):
            drawn.setdefault(cell, []).append(number)
    assert max(map(len, drawn.values())) > 5
    assert all(len(set(numbers)) == len(numbers) for numbers in drawn.values())


def test_steps_of_an_epoch_are_rounded_up(stream):
    assert stream().steps_per_epoch == 12
    assert stream(global_batch=190).steps_per_epoch == 1


def test_cells_of_length_0_are_skipped_and_counted(stream):
    assert stream().skipped == 10
    assert len(stream().cells) == 190


def test_a_batch_larger_than_the_epoch_holds_cells_of_several(stream):
    found = cells_in(stream(cells=np.arange(1, 6), global_batch=12, cost_budget=64).step(0))
    assert sorted(np.bincount([cell for cell, *_ in found], minlength=6)[1:]) == [2, 2, 2, 3, 3]


def test_a_stream_over_a_set_is_that_over_the_array(stream):
    chosen = CellSet.of(np.arange(200) >= 100)
    of_set, of_array = stream(cells=chosen), stream(cells=chosen[:])
    assert of_set.skipped == of_array.skipped == 5
    for k in (0, 9):
        assert cells_in(of_set.step(k)) == cells_in(of_array.step(k))


class TestValidation:
    """Validation sees the same cells with the same random numbers every time."""

    def test_cells_come_in_their_own_order_and_the_last_batch_is_short(self, stream):
        validation = stream(validation=True, cells=np.arange(50, 90), cost_budget=1000)
        steps = [cells_in(validation.step(k)) for k in range(validation.steps_per_epoch)]
        assert [len(step) for step in steps] == [16, 16, 6]
        assert [cell for step in steps for cell, *_ in step] == [c for c in range(50, 90) if c % 20]
        with pytest.raises(UsageError, match="step 3"):
            validation.step(3)

    def test_its_random_numbers_are_not_those_of_training(self, stream):
        validation, training = (
            {cell: number for cell, _, number in cells_in(stream(global_batch=190, **more).step(0))}
            for more in ({"validation": True}, {})
        )
        assert validation.keys() == training.keys()
        assert all(validation[cell] != training[cell] for cell in training)

    def test_more_ranks_than_cells_leave_a_rank_without(self, stream):
        shares = [stream(validation=True, cells=np.arange(1, 4), rank=r, ranks=4).step(0) for r in range(4)]
        assert sorted(len(share) for share in shares) == [0, 1, 1, 1]

    def test_prefetching_ends_with_the_cells(self, stream):
        with stream(validation=True).prefetched(0, threads=1, depth=2) as ahead:
            assert len(list(ahead)) == 12


class TestState:
    """What is kept to resume."""

    def test_it_is_a_few_numbers_and_leads_back_to_the_step(self, stream, store):
        state = stream().state_dict(17)
        assert state["generation"] == store.generation
        assert stream(ranks=4, cost_budget=900).step_of(state) == 17

    @pytest.mark.parametrize("change", [{"seed": 2}, {"global_batch": 8}])
    def test_another_stream_refuses_it(self, change, stream):
        with pytest.raises(UsageError, match=next(iter(change))):
            stream(**change).step_of(stream().state_dict(17))


def test_evenness_is_that_of_the_batches(stream):
    imbalance, fill = stream(ranks=4).evenness(3)
    shares = [[batch.n_tokens for batch in stream(rank=rank, ranks=4).step(3)] for rank in range(4)]
    costs = [sum(share) for share in shares]
    assert imbalance == pytest.approx(max(costs) / np.mean(costs) - 1)
    padded = sum(-(-cost // MULTIPLE) * MULTIPLE for share in shares for cost in share)
    assert fill == pytest.approx(sum(costs) / padded)


@pytest.mark.parametrize("threads", [0, 1, 4])
def test_an_unreadable_cell_is_named_in_the_trainer(threads, stream, store, monkeypatch):
    poisoned = int(stream().step(2)[1].cells[0])
    gather = store.gather

    def fail(cells, **more):
        if poisoned in cells:
            raise OSError("unreadable page")
        return gather(cells, **more)

    monkeypatch.setattr(store, "gather", fail)
    ahead = stream().prefetched(2, 3, threads=threads, depth=2)
    with pytest.raises(DataError, match=rf"step 2, cells {poisoned}: unreadable page"):
        next(ahead)


def test_a_cell_of_another_length_than_recorded_is_named(stream, lengths):
    wrong = lengths.copy()
    wrong[7] += 1
    with pytest.raises(DataError, match=r"made-up: step 0, cells 7: not the lengths that were recorded"):
        stream(lengths=wrong, validation=True).step(0)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"ranks": 17}, UsageError, "global_batch 16 is smaller than the number of data-parallel ranks 17"),
        ({"cost_budget": 39}, UsageError, "cost_budget 39 does not hold a cell that costs 40"),
        ({"rank": 2, "ranks": 2}, UsageError, "rank 2"),
        ({"seed": -1}, UsageError, "seed"),
        ({"cells": np.array([0, 20])}, DataError, "no cell to train on has a count in this store"),
        ({"cells": np.array([0, 20]), "validation": True}, DataError, "no cell held out has a count in this store"),
        ({"lengths": np.ones(7, np.uint16)}, DataError, "7 lengths for 200 cells"),
    ],
    ids=["more ranks than cells", "small budget", "rank", "seed", "no cells", "none held out", "lengths"],
)
def test_what_cannot_work_is_refused_before_the_first_step(change, error, message, stream):
    with pytest.raises(error, match=message):
        stream(**change)
