# SPDX-License-Identifier: Apache-2.0
"""Exact non-zero medians of every gene over any number of cells, in bounded memory.

A median is selected, not sorted out of all values: each gene has an interval that holds its lower middle value. A
sample of the cells says where (Floyd and Rivest 1975); one pass over all cells counts what lies below and keeps what
lies inside, which proves the interval right, and the middle is read off. Where the intervals hold more values than
fit, a pass counts them in bins instead and narrows each interval to the bin of the middle; where a sample misled, the
counts say on which side to go on. Every pass is shared by threads, which take turns by blocks of cells.

Shapes: G genes, W workers.
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from megacell.core.buffers import RowBuffer
from megacell.core.errors import DataError
from megacell.core.vector_sort import sort_address
from megacell.geneformer.vocabulary.median_kernels import (
    ABOVE_ALL,
    BIN_BITS,
    COUNTED,
    LOW,
    RANGE_BITS,
    WIDTH,
    brackets,
    by_gene,
    collect,
    count_bins,
    count_seen,
    pick,
    values_of_rows,
)
from megacell.store import CellStore

CELLS_AT_ONCE = 32  # their values stay in the processor's second cache
MOST_VALUES = 1 << 24  # kept at once: 160 MiB
LEAST_SAMPLE = 1024  # cells that say where medians lie
LOWER = np.uint64(0xFFFFFFFF)
Block = tuple[np.ndarray, np.ndarray]


@dataclass(frozen=True, eq=False)
class CellsOf:
    """Cells whose values count.

    Attributes
    ----------
    store : CellStore
    cells : int64 [n]
        Global cell numbers.
    numbers : int array [genes of the store], optional
        Under which number each gene is counted; its own by default.
    """

    store: CellStore
    cells: np.ndarray
    numbers: np.ndarray | None = None


class _Values:
    """The values of cells, block by block, as often as asked for."""

    def __init__(self, parts: Sequence[CellsOf], step: int = 1) -> None:
        self._blocks = []
        for part in parts:
            cells = np.asarray(part.cells, np.int64)[::step]
            self._blocks += [
                (part, cells[first : first + CELLS_AT_ONCE]) for first in range(0, len(cells), CELLS_AT_ONCE)
            ]
        self.cells = sum(len(cells) for _, cells in self._blocks)

    def of(self, worker: int, workers: int) -> Iterator[Block]:
        """Yield one worker's blocks: gene numbers and the bits of their values, valid until the next."""
        room = RowBuffer()
        for part, cells in self._blocks[worker::workers]:
            _, genes, bits = values_of(part.store, cells, room)
            yield genes if part.numbers is None else part.numbers[genes], bits


def values_of(store: CellStore, cells: np.ndarray, room: RowBuffer) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return cells' values, valid until ``room`` is used again.

    Returns
    -------
    indptr : int64 [n + 1]
    genes : uint16 | uint32 [z]
        The store's numbers, ascending within a cell.
    bits : uint64 [z]
        Of count / cell total x 10,000 as float64.

    Raises
    ------
    DataError
        A count that is none.
    """
    indptr, genes, counts = store.gather(cells, allocate=room)
    bits = room(len(genes), np.dtype(np.uint64))
    if (wrong := values_of_rows(indptr, counts, bits)) >= 0:
        raise DataError(
            f"{store.path}: cell {cells[wrong]:,} has a count that is negative, infinite or no number; make the store "
            "again, from files of counts"
        )
    return indptr, genes, bits


def gene_medians(
    store: CellStore, cells: np.ndarray, min_cells: int = 1, most_values: int = MOST_VALUES, workers: int = 1
) -> tuple[np.ndarray, np.ndarray]:
    """Compute each gene's exact median of count / cell total x 10,000 over the cells that have it.

    Parameters
    ----------
    store : CellStore
        Whose genes.
    cells : int64 [n]
        Global cell numbers. The total is that of all counts of a cell in the store.
    min_cells : int, default 1
        Genes in fewer cells get no median.
    most_values : int
        Values held in memory at once, besides the bins (0.5 KiB a gene and worker); fewer take more passes.
    workers : int, default 1
        Threads.

    Returns
    -------
    medians : np.ndarray, float64 [G]
        NaN without enough cells. The mean of the two middle values where the number of cells is even.
    seen : np.ndarray, int64 [G]
        In how many of the cells each gene has a count.
    """
    return medians_over([CellsOf(store, cells)], len(store.gene_ids), min_cells, most_values, workers)


def medians_over(
    parts: Sequence[CellsOf], genes: int, min_cells: int = 1, most_values: int = MOST_VALUES, workers: int = 1
) -> tuple[np.ndarray, np.ndarray]:
    """Compute medians as `gene_medians` does, over cells of several stores, for ``genes`` numbers of genes."""
    with ThreadPoolExecutor(workers, thread_name_prefix="megacell-medians") as pool:
        search = _Search(_Values(parts), genes, min_cells, most_values, workers, pool)
        search.take_sample(parts)
        while search.wanted.any():
            search.go_through()
    return search.medians, search.seen.astype(np.int64)


class _Kept:
    """What one worker keeps of the values inside intervals: genes of a range together, ``room`` for each range."""

    def __init__(self, state: np.ndarray, room: np.ndarray) -> None:
        self.state = state
        sums = np.add.reduceat(room, np.arange(0, len(room), 1 << RANGE_BITS)) if len(room) else room
        sizes = sums + sums // 32 + 1024
        self._starts = np.cumsum(sizes) - sizes
        self._streams = np.stack([self._starts, self._starts + sizes - 1], axis=1)
        self._kept, self._genes = np.empty(int(sizes.sum()), np.uint64), np.empty(int(sizes.sum()), np.uint16)

    def take(self, genes: np.ndarray, bits: np.ndarray) -> None:
        """Count values, and keep those inside."""
        collect(genes, bits, self.state, self._streams, self._kept, self._genes)

    def full(self) -> np.ndarray:
        """Return the genes of which values may have found no room, bool [G]."""
        lost: np.ndarray = np.repeat(self._streams[:, 0] == self._streams[:, 1], 1 << RANGE_BITS)[: len(self.state)]
        return lost

    def ranges(self) -> list[slice]:
        """Return the genes of each range."""
        return [slice(first, first + (1 << RANGE_BITS)) for first in range(0, len(self.state), 1 << RANGE_BITS)]

    def of(self, genes: slice) -> tuple[np.ndarray, np.ndarray]:
        """Return the values that were kept of a range, and which of its genes each is of."""
        number = genes.start >> RANGE_BITS
        own = slice(self._starts[number], self._streams[number, 0])
        return self._kept[own], self._genes[own]


class _Bins:
    """One worker's counts of the values inside intervals, by bins 2^``shift`` wide."""

    def __init__(self, state: np.ndarray, shift: np.ndarray) -> None:
        self.state, self._shift = state, shift
        self.bins = np.zeros((len(state), 1 << BIN_BITS), np.uint32)

    def take(self, genes: np.ndarray, bits: np.ndarray) -> None:
        """Count values."""
        count_bins(genes, bits, self.state, self._shift, self.bins)


def _gene_after_gene(kept: list[_Kept], genes: slice) -> tuple[np.ndarray, np.ndarray]:
    """Return what all workers kept of a range, and where each gene's values end."""
    parts = [own.of(genes) for own in kept]
    counts = sum(np.bincount(numbers, minlength=1 << RANGE_BITS) for _, numbers in parts)
    ends = np.cumsum(counts) - counts
    values = np.empty(sum(len(own) for own, _ in parts), np.uint64)
    for own, numbers in parts:
        by_gene(own, numbers, ends, values)
    return values, ends[: len(kept[0].state[genes])]


class _Search:
    """The search for all genes' middle values.

    Attributes
    ----------
    low, width : uint64 [G]
        Each gene's interval, which holds value number ``target`` (from 0) most likely.
    expected : int64 [W, G]
        How many values each worker will find inside.
    lower : float64 [G]
        The lower middle value where it is known and the upper one is looked for.
    """

    def __init__(
        self, values: _Values, genes: int, min_cells: int, most_values: int, workers: int, pool: ThreadPoolExecutor
    ) -> None:
        self.values, self.min_cells, self.most_values = values, min_cells, most_values
        self.workers, self.pool = workers, pool
        self.low, self.width = np.zeros(genes, np.uint64), np.full(genes, ABOVE_ALL, np.uint64)
        self.expected = np.zeros((workers, genes), np.int64)
        self.wanted = np.ones(genes, bool)
        self.medians, self.lower = np.full(genes, np.nan), np.full(genes, np.nan)
        self.target = np.zeros(genes, np.int64)
        self.seen: Any = None

    def take_sample(self, parts: Sequence[CellsOf]) -> None:
        """Set intervals by some cells from all over, as many as are worth a look and fit."""
        few = _Values(parts, max(1, self.values.cells // 64))
        stored = sum(len(bits) for _, bits in few.of(0, 1)) / max(1, few.cells)
        fit = int(self.most_values / (2 * max(1.0, stored)))
        wanted = min(max(LEAST_SAMPLE, self.values.cells // 16), fit)
        step = max(1, self.values.cells // max(1, wanted))
        sample = _Values(parts, step)
        seen = np.zeros(len(self.low), np.uint32)
        for block in sample.of(0, 1):
            count_seen(*block, seen)
        if not sample.cells or seen.sum() > self.most_values:
            self.expected[:] = self.values.cells  # too few fit for a sample to be of use: bins will tell
            return
        kept = _Kept(self._state(self.width), seen.astype(np.int64))
        for block in sample.of(0, 1):
            kept.take(*block)
        share = np.zeros(len(self.low), np.int64)
        for genes in kept.ranges():
            values, ends = _gene_after_gene([kept], genes)
            brackets(values, ends, sort_address(), self.low[genes], self.width[genes], share[genes])
        times = self.values.cells / sample.cells / self.workers
        self.expected[:] = np.ceil((share + 2) * times).astype(np.int64)  # for a gene that the sample has not, a few

    def go_through(self) -> None:
        """Go once through all cells, and settle or narrow each gene's interval."""
        width = np.where(self.wanted, self.width, np.uint64(0))
        room = np.where(width > 1, np.minimum(self.expected, self.values.cells), 0)  # one value wide: no need to keep
        if room.sum() <= self.most_values:
            self._collect(width, room)
        else:
            self._narrow(width)

    def _state(self, width: np.ndarray) -> np.ndarray:
        state = np.zeros((len(self.low), 4), np.uint64)
        state[:, LOW], state[:, WIDTH] = self.low, width
        return state

    def _each(self, take: Sequence[Callable[[np.ndarray, np.ndarray], None]]) -> None:
        """Have each worker go through its blocks; the first time, count all values too."""
        first = self.seen is None
        seen = [np.zeros(len(self.low), np.uint32) for _ in range(self.workers)]

        def go(worker: int) -> None:
            for genes, bits in self.values.of(worker, self.workers):
                take[worker](genes, bits)
                if first:
                    count_seen(genes, bits, seen[worker])

        list(self.pool.map(go, range(self.workers)))
        if first:
            self.seen = np.sum(seen, axis=0, dtype=np.int64)
            self.wanted &= self.seen >= max(1, self.min_cells)
            self.target = (self.seen - 1) // 2

    def _collect(self, width: np.ndarray, room: np.ndarray) -> None:
        kept = [_Kept(self._state(width), room[worker]) for worker in range(self.workers)]
        self._each([own.take for own in kept])
        below, inside = _counted([own.state for own in kept])
        hit = self._follow(below, inside)
        lost = np.any([own.full() for own in kept], axis=0) & (width > 1)
        self.expected[:, hit & lost] = inside[:, hit & lost]
        done = hit & ~lost
        found = np.broadcast_to(self.low, (2, len(self.low))).copy()  # an interval one value wide is that value
        ranks = np.stack([self.target, self.target + (self.seen % 2 == 0)]) - below.sum(0)

        def pick_range(genes: slice) -> None:
            values, ends = _gene_after_gene(kept, genes)
            among = (done & (width > 1))[genes]
            pick(values, ends, ranks[:, genes], among, sort_address(), found[:, genes])

        list(self.pool.map(pick_range, kept[0].ranges()))
        self._settle(np.flatnonzero(done), found, ranks[1] < inside.sum(0), below, inside)

    def _settle(
        self, done: np.ndarray, found: np.ndarray, both: np.ndarray, below: np.ndarray, inside: np.ndarray
    ) -> None:
        """Take the values found; where only the lower middle one is among them, look for the next above."""
        values = found.view(np.float64)
        upper_too = done[both[done] | ~np.isnan(self.lower[done])]
        known = ~np.isnan(self.lower[upper_too])
        first = np.where(known, self.lower[upper_too], values[0, upper_too])
        last = np.where(known, values[0, upper_too], values[1, upper_too])
        self.medians[upper_too] = 0.5 * (first + last)
        self.wanted[upper_too] = False
        other = np.setdiff1d(done, upper_too)
        self.lower[other] = values[0, other]
        self.target[other] += 1
        self._go_above(other, below, inside)

    def _narrow(self, width: np.ndarray) -> None:
        shift = _bin_shift(width)
        made = [_Bins(self._state(width), shift) for _ in range(self.workers)]
        self._each([own.take for own in made])
        below, inside = _counted([own.state for own in made])
        hit = np.flatnonzero(self._follow(below, inside))
        bins = [own.bins[hit] for own in made]
        rest = self.target[hit] - below.sum(0)[hit]
        which = (np.cumsum(np.sum(bins, axis=0, dtype=np.int64), axis=1) <= rest[:, None]).sum(1)
        self.low[hit] += which.astype(np.uint64) << shift[hit].astype(np.uint64)
        self.width[hit] = np.uint64(1) << shift[hit].astype(np.uint64)
        self.expected[:, hit] = [own[np.arange(len(hit)), which] for own in bins]

    def _follow(self, below: np.ndarray, inside: np.ndarray) -> np.ndarray:
        """Move intervals that the target is not in to the side where it is; return those that it is in, bool [G]."""
        under = self.wanted & (self.target < below.sum(0))
        over = self.wanted & (self.target >= below.sum(0) + inside.sum(0))
        self._go_above(np.flatnonzero(over), below, inside)
        self.width[under], self.low[under] = self.low[under], 0
        self.expected[:, under] = below[:, under]
        return self.wanted & ~under & ~over

    def _go_above(self, genes: np.ndarray, below: np.ndarray, inside: np.ndarray) -> None:
        self.low[genes] += self.width[genes]
        self.width[genes] = np.uint64(ABOVE_ALL) - self.low[genes]
        rest = self.seen[genes] - below.sum(0)[genes] - inside.sum(0)[genes]
        self.expected[:, genes] = rest  # of one worker all, at worst


def _counted(states: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Return how many values each worker found below and inside, int64 [W, G]."""
    counted = np.stack([state[:, COUNTED] for state in states])
    return (counted >> np.uint64(32)).astype(np.int64), (counted & LOWER).astype(np.int64)


def _bin_shift(width: np.ndarray) -> np.ndarray:
    """Return the power of two of the bins' width, uint8 [G], so that an interval has at most 2^BIN_BITS."""
    last = (np.maximum(width, 1) - 1).astype(np.uint64)
    bits = np.zeros(len(last), np.int64)
    for step in (32, 16, 8, 4, 2, 1):  # the length of ``last`` in bits
        long = (last >> np.uint64(step)) > 0
        bits[long] += step
        last = np.where(long, last >> np.uint64(step), last)
    return np.maximum(bits + (last > 0) - BIN_BITS, 0).astype(np.uint8)
