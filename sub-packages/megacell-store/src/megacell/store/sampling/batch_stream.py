# SPDX-License-Identifier: Apache-2.0
"""The stream of global batches: which cells each step has, which of them are this rank's, and their micro-batches.

``BatchStream.step(k)`` is a pure function of k: which cells, which of them are this rank's and the random numbers of
each follow from the seed alone, so a run may be resumed at any step, and with another number of ranks. What a
micro-batch is made of is the business of a `Collator`.
"""

from typing import Generic, Protocol, TypeVar

import numpy as np

from megacell.core.errors import DataError, MegacellError, UsageError
from megacell.core.rng import TRAINING, VALIDATION, stream_key
from megacell.store.read.reader import Array, CellReader
from megacell.store.sampling.cell_set import CellSet
from megacell.store.sampling.order import Order, Shuffled, global_batch
from megacell.store.sampling.prefetched import Prefetched
from megacell.store.sampling.sharing import micro_batches, ranges_within, share_out

COST_AT_ONCE = 1 << 19  # of the micro-batches made by one call: 8 MiB, where a unit of cost is four 32-bit numbers
_FAILURES = (MegacellError, ArithmeticError, LookupError, OSError, ValueError, TypeError, MemoryError)


class MicroBatch(Protocol):
    """What is asked of a micro-batch, whatever is in it.

    Attributes
    ----------
    cells : int64 [cells]
        Global cell numbers.
    n_tokens : int
        What it costs, without padding.
    n_items : int
        Losses that a network computes for it.
    """

    @property
    def cells(self) -> Array: ...
    @property
    def n_tokens(self) -> int: ...
    @property
    def n_items(self) -> int: ...


Batch = TypeVar("Batch", bound=MicroBatch)


class Collator(Protocol[Batch]):
    """Makes micro-batches of cells; brought by a model family. Called by several threads at once.

    Attributes
    ----------
    max_cost : int
        Most that a cell can cost.
    multiple_of : int
        What a micro-batch costs is rounded up to a multiple of this.
    needed : str
        What a cell must have to be in a batch, for messages: "a gene that vocabulary V2 knows".
    """

    @property
    def max_cost(self) -> int: ...
    @property
    def multiple_of(self) -> int: ...
    @property
    def needed(self) -> str: ...

    def costs(self, lengths: Array) -> Array:
        """Return what cells of these lengths (integers [n]) cost, int64 [n]: what ranks and micro-batches share."""

    def make(self, reader: CellReader, cells: Array, keys: Array, first: Array, costs: Array) -> list[Batch]:
        """Make several micro-batches at once.

        Parameters
        ----------
        reader : CellReader
        cells : int64 [n]
            Micro-batch after micro-batch.
        keys : uint32 [n, 2]
            The key of each cell's random numbers: `stream_key` of its epoch.
        first : int64 [micro-batches + 1]
            The first cell of each, as an index into ``cells``; the last is n.
        costs : int64 [n]
            As of `costs`, from the recorded lengths.

        Raises
        ------
        DataError
            A cell has another cost than this.
        """


class BatchStream(Generic[Batch]):
    """The endless sequence of global batches, as one rank sees it.

    Parameters
    ----------
    store : CellReader
        A `CellStore`, or what stands in for one.
    cells : int64 [n] or CellSet
        The cells to go through, by global number; those of length 0 are skipped. A set holds a bit a cell, which is
        mapped; an array, eight bytes.
    lengths : integers [cells of the store]
        From which the collator computes what a cell costs.
    collator : Collator
        Makes the micro-batches.
    global_batch : int
        Cells of one step, over all ranks.
    cost_budget : int
        Most that the cells of one micro-batch cost together.
    seed : int
    rank, ranks : int
        Data-parallel ranks.
    order : Order, optional
        `Shuffled` by default, or `BlockShuffled` or `Weighted`, which counts the cells that are not skipped.
    validation : bool, default False
        Cells in their own order, random numbers from the validation stream's epoch 0, the last batch short: the same
        at every validation. Without it cells are shuffled anew in each epoch, and batches run on over the end of one.

    Attributes
    ----------
    skipped : int
        Cells of length 0.

    Raises
    ------
    UsageError
        A global batch smaller than the ranks; a budget that does not hold every cell; a rank outside the ranks.
    DataError
        No cell to go through, or lengths of another store.
    """

    def __init__(
        self,
        store: CellReader,
        cells: Array | CellSet,
        lengths: Array,
        collator: Collator[Batch],
        *,
        global_batch: int,
        cost_budget: int,
        seed: int,
        rank: int = 0,
        ranks: int = 1,
        order: Order | None = None,
        validation: bool = False,
    ) -> None:
        if global_batch < ranks:
            raise UsageError(
                f"global_batch {global_batch} is smaller than the number of data-parallel ranks {ranks}; raise it"
            )
        if cost_budget < collator.max_cost:
            raise UsageError(f"cost_budget {cost_budget} does not hold a cell that costs {collator.max_cost}; raise it")
        if not 0 <= rank < ranks:
            raise UsageError(f"rank {rank} is not one of {ranks} ranks")
        if len(lengths) != len(store):
            raise DataError(f"{store.path}: {len(lengths)} lengths for {len(store)} cells; count them again")
        self.cells: Array | CellSet
        if isinstance(cells, CellSet):
            self.cells = cells.having(lengths)
        else:
            cells = np.asarray(cells, np.int64)
            self.cells = cells[lengths[cells] > 0]
        self.skipped = len(cells) - len(self.cells)
        if not len(self.cells):
            what = "held out" if validation else "to train on"
            raise DataError(f"{store.path}: no cell {what} has {collator.needed}; check both")
        self.store, self.lengths, self.collator = store, lengths, collator
        self.global_batch, self.cost_budget, self.seed = global_batch, cost_budget, seed
        self.rank, self.ranks, self.validation, self.order = rank, ranks, validation, order or Shuffled()
        stream_key(seed, 0, TRAINING)  # a wrong seed is refused here, not at the first step

    @property
    def steps_per_epoch(self) -> int:
        """Steps until every cell has been seen once; the last one may run on into the next epoch."""
        return -(-len(self.cells) // self.global_batch)

    def step(self, k: int) -> list[Batch]:
        """Return this rank's micro-batches of global batch ``k``.

        In training every rank has at least one. Of the last, short batch of a validation a rank may have none.

        Raises
        ------
        DataError
            A cell could not be read or does not fit its recorded length; names the cells.
        UsageError
            A step below 0, or beyond the end of a validation.
        """
        if k < 0 or (self.validation and k >= self.steps_per_epoch):
            raise UsageError(f"step {k} is outside the {self.steps_per_epoch} steps of a validation, or below 0")
        cells, epochs = self._global_batch(k)
        costs = self.collator.costs(self.lengths[cells])
        mine = np.flatnonzero(share_out(costs, self.ranks) == self.rank)
        parts = [mine[part] for part in micro_batches(costs[mine], self.cost_budget)]
        keys = self._keys(epochs)
        made: list[Batch] = []
        for begin, end in ranges_within(np.array([costs[part].sum() for part in parts]), COST_AT_ONCE):
            first, these = np.cumsum([0, *map(len, parts[begin:end])]), np.concatenate(parts[begin:end])
            made += self._micro_batches(k, cells[these], keys[these], first, costs[these])
        return made

    def evenness(self, k: int) -> tuple[float, float]:
        """Return the imbalance and the fill of step ``k``, from lengths alone.

        Returns
        -------
        imbalance : float
            By which share the fullest rank's cost exceeds the mean of all ranks'.
        fill : float
            Real cost of that with padding, over all ranks.
        """
        cells, _ = self._global_batch(k)
        costs = self.collator.costs(self.lengths[cells])
        rank_of, multiple = share_out(costs, self.ranks), self.collator.multiple_of
        load = np.bincount(rank_of, weights=costs, minlength=self.ranks)
        padded = 0
        for mine in (costs[rank_of == rank] for rank in range(self.ranks)):
            real = np.array([mine[part].sum() for part in micro_batches(mine, self.cost_budget)], np.int64)
            padded += int((-(-real // multiple) * multiple).sum())
        return float(load.max() / load.mean() - 1), float(load.sum() / padded)

    def state_dict(self, step: int) -> dict[str, int | str]:
        """Return what has to be kept to resume at ``step``: a few integers and the store's generation."""
        return {
            "step": step,
            "seed": self.seed,
            "global_batch": self.global_batch,
            "cells": len(self.cells),
            "generation": self.store.generation,
            "store": self.store.digest,
        }

    def step_of(self, state: dict[str, int | str]) -> int:
        """Return the step to resume at.

        Raises
        ------
        UsageError
            The state is that of another store, generation, seed, batch size or choice of cells; names the difference.
        """
        for name, now in self.state_dict(int(state["step"])).items():
            if state.get(name) != now:
                raise UsageError(
                    f"{self.store.path}: the state was kept with {name} {state.get(name)}, here it is {now}; "
                    "go on with the same, or start anew"
                )
        return int(state["step"])

    def _global_batch(self, k: int) -> tuple[Array, Array]:
        """Return the global numbers of a step's cells and the epoch of each, int64."""
        if self.validation:
            cells = self.cells[k * self.global_batch : (k + 1) * self.global_batch]
            return cells, np.zeros(len(cells), np.int64)
        which, epochs = global_batch(k, self.global_batch, len(self.cells), self.seed, self.order)
        return self.cells[which], epochs

    def _keys(self, epochs: Array) -> Array:
        """Return the key of each cell's random numbers, uint32 [n, 2]."""
        stream = VALIDATION if self.validation else TRAINING
        different, which = np.unique(epochs, return_inverse=True)
        return np.array([stream_key(self.seed, epoch, stream) for epoch in different.tolist()])[which]

    def _micro_batches(self, k: int, cells: Array, keys: Array, first: Array, costs: Array) -> list[Batch]:
        try:
            return self.collator.make(self.store, cells, keys, first, costs)
        except _FAILURES as error:
            failing = self._failing(cells, keys, costs)
            named = ", ".join(map(str, failing[:8])) + (f" and {len(failing) - 8} more" if len(failing) > 8 else "")
            raise DataError(f"{self.store.path}: step {k}, cells {named}: {error}") from error

    def _failing(self, cells: Array, keys: Array, costs: Array) -> list[int]:
        """Return the cells that fail by themselves; all, where none does."""
        failing, alone = [], np.array([0, 1])
        for i, cell in enumerate(cells.tolist()):
            try:
                self.collator.make(self.store, cells[i : i + 1], keys[i : i + 1], alone, costs[i : i + 1])
            except _FAILURES:
                failing.append(cell)
        return failing or cells.tolist()

    def prefetched(self, first: int, last: int | None = None, *, threads: int, depth: int) -> Prefetched[list[Batch]]:
        """Return an iterator over the micro-batches of steps first … last - 1 (endless without last), made ahead.

        Parameters
        ----------
        first, last : int
            Steps of this stream; a validation ends by itself.
        threads, depth : int
            Threads in the background, and how many steps each is ahead; see `Prefetched`.
        """
        if self.validation:
            last = self.steps_per_epoch if last is None else min(last, self.steps_per_epoch)
        return Prefetched(self.step, first, last, threads=threads, depth=depth)
