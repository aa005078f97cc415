# SPDX-License-Identifier: Apache-2.0
"""How many cells have a value of each gene in each of fine buckets: what medians of cells apart are merged by.

A bucket spans 1/256 of an octave, so a median read off is within `MEDIAN_ERROR` of itself, however many histograms were
added up: their counts are whole numbers. Counting takes one pass over the cells, in memory that their number has no
part in: a KiB a gene and octave that its values span, once for all threads, and 14 bytes a value of the 256 cells that
each thread has at hand.

Shapes: G genes, E occupied buckets.
"""

import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from megacell.core.buffers import RowBuffer
from megacell.core.errors import DataError
from megacell.geneformer.vocabulary.gene_names import Genes
from megacell.geneformer.vocabulary.histogram_kernels import (
    BITS,
    DAMAGED,
    FULL,
    OCTAVES,
    SHIFT,
    add_sorted,
    count_occupied,
    count_range,
    find_middle,
    read_out,
    split_rows,
)
from megacell.geneformer.vocabulary.median_kernels import RANGE_BITS
from megacell.geneformer.vocabulary.medians import values_of
from megacell.store import CellStore

MEDIAN_ERROR = 2.0 ** -(BITS + 1)  # of a median, relative: half a bucket at its lower end
CELLS_AT_ONCE = 256  # enough of a range's values at once that its lock costs nothing
_KEY_BITS = 20  # a bucket has 11 bits of exponent and `BITS`


@dataclass(frozen=True, eq=False)
class Histograms:
    """The values of each gene, by bucket.

    Attributes
    ----------
    genes : Genes
        By ascending id.
    bounds : np.ndarray, int64 [G + 1]
        Where each gene's buckets begin.
    buckets : np.ndarray, int32 [E]
        Upper bits of the values, as float64; ascending within a gene.
    cells : np.ndarray, int64 [E]
        How many cells have such a value; never 0.
    """

    genes: Genes
    bounds: np.ndarray
    buckets: np.ndarray
    cells: np.ndarray

    @classmethod
    def count(cls, store: CellStore, cells: np.ndarray, workers: int = 1) -> "Histograms":
        """Count the values of some cells of a store: count / cell total x 10,000, where it is not zero.

        Parameters
        ----------
        store : CellStore
        cells : int64 [n]
            Global cell numbers.
        workers : int, default 1
            Threads.

        Raises
        ------
        DataError
            A value that no counts have.
        """
        ranges = _count_ranges(store, cells, workers)
        genes, (rows,) = Genes.union([Genes(store.gene_ids, store.symbols, store.biotypes)])
        occupied = np.zeros(len(rows), np.int64)
        occupied[rows] = np.concatenate([each.occupied() for each in ranges])
        bounds = np.concatenate([np.zeros(1, np.int64), np.cumsum(occupied)])
        buckets, counts = np.empty(bounds[-1], np.int32), np.empty(bounds[-1], np.int64)
        starts = bounds[rows]
        while ranges:
            each = ranges.pop()  # its memory is given back
            read_out(each.pages, each.counts, starts[each.first : each.first + len(each.pages)], buckets, counts)
        return cls(genes, bounds, buckets, counts)

    @classmethod
    def sum(cls, parts: Sequence["Histograms"]) -> "Histograms":
        """Add up histograms of cells apart; their order does not matter."""
        if len(parts) == 1:
            return parts[0]
        genes, numbers = Genes.union([part.genes for part in parts])
        keys, cells = parts[0]._keys(numbers[0]), parts[0].cells
        for part, own in zip(parts[1:], numbers[1:], strict=True):
            more = part._keys(own)
            out, out_cells = np.empty(len(keys) + len(more), np.int64), np.empty(len(keys) + len(more), np.int64)
            n = add_sorted(keys, cells, more, part.cells, out, out_cells)
            keys, cells = out[:n], out_cells[:n]
        bounds = np.searchsorted(keys, np.arange(len(genes.ids) + 1) << _KEY_BITS)
        return cls(genes, bounds, (keys & ((1 << _KEY_BITS) - 1)).astype(np.int32), cells)

    def medians(self, min_cells: int = 1) -> np.ndarray:
        """Return each gene's median, float64 [G], within `MEDIAN_ERROR`; NaN for a gene in fewer cells."""
        middle = np.empty((2, len(self.genes.ids)), np.int64)
        find_middle(self.bounds, self.buckets, self.cells, max(1, min_cells), middle)
        halfway = middle << SHIFT | 1 << (SHIFT - 1)
        return np.where(middle[0] < 0, np.nan, 0.5 * halfway.view(np.float64).sum(0))

    def _keys(self, numbers: np.ndarray) -> np.ndarray:
        return np.repeat(numbers, np.diff(self.bounds)) << _KEY_BITS | self.buckets


class _Range:
    """The counts of some genes next to each other, which one thread at a time adds to."""

    def __init__(self, first: int, genes: int) -> None:
        self.first, self.lock = first, threading.Lock()
        self.pages, self.used = np.zeros((genes, OCTAVES), np.int32), np.ones(1, np.int64)
        self.counts = np.zeros((1, 1 << BITS), np.uint32)  # no gene has page 0

    def add(self, genes: np.ndarray, bits: np.ndarray, at: np.ndarray, ends: np.ndarray) -> bool:
        """Count the values ``at`` … ``ends`` of each cell; False if a value or its gene cannot be right."""
        at = at.copy()
        with self.lock:
            while True:
                done = count_range(genes, bits, at, ends, self.first, self.pages, self.counts, self.used)
                if done != FULL:
                    return bool(done != DAMAGED)
                more = max(256, len(self.counts) // 4)
                self.counts = np.concatenate([self.counts, np.zeros((more, 1 << BITS), np.uint32)])

    def occupied(self) -> np.ndarray:
        """Return how many buckets of each gene are occupied."""
        buckets = np.zeros(len(self.pages), np.int64)
        count_occupied(self.pages, self.counts, buckets)
        return buckets


def _count_ranges(store: CellStore, cells: np.ndarray, workers: int) -> list[_Range]:
    """Count the values of cells, shared by threads, which take turns by blocks of cells."""
    genes_of_store = len(store.gene_ids)
    firsts = np.arange(0, genes_of_store, 1 << RANGE_BITS)
    ranges = [_Range(first, min(1 << RANGE_BITS, genes_of_store - first)) for first in firsts.tolist()]

    def go(worker: int) -> None:
        room, turn = RowBuffer(), worker * len(ranges) // workers
        for block in range(worker * CELLS_AT_ONCE, len(cells), workers * CELLS_AT_ONCE):
            indptr, genes, bits = values_of(store, cells[block : block + CELLS_AT_ONCE], room)
            starts = np.empty((len(ranges) + 1, len(indptr) - 1), np.int64)
            split_rows(genes, indptr, firsts, starts)
            for r in [*range(turn, len(ranges)), *range(turn)]:  # threads begin apart, so that none waits for another
                if not ranges[r].add(genes, bits, starts[r], starts[r + 1]):
                    raise DataError(
                        f"{store.path}: a count that is none, or genes that do not ascend in their cell; run `megacell "
                        f"verify {store.path}`"
                    )

    with ThreadPoolExecutor(workers, thread_name_prefix="megacell-histograms") as pool:
        list(pool.map(go, range(workers)))
    return ranges
