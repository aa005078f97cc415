# SPDX-License-Identifier: Apache-2.0
"""Reading a graph between cells: neighbours and weights of a cell, of many, and neighbours drawn by chance."""

from functools import cached_property
from typing import Any

import numpy as np
import scipy.sparse as sp

from megacell.core.errors import DataError, UsageError
from megacell.core.jit import compiled
from megacell.store.format.canonical import ODD, mix
from megacell.store.format.graph import FOLDER, map_graph
from megacell.store.read.reader import Array, StoreReader


class Neighbours:
    """One graph of a store, read-only; made by `CellStore.neighbours`.

    Cells go by their number in the store. Its arrays are mapped when they are first asked for, and the pages are
    shared with every other process. Pickles as the store's path and generation and the graph's name.

    Attributes
    ----------
    store : CellStore
    name : str
    cells : int
        The graph is over the store's first so many; cells that were added without a graph have no neighbours.
    edges : int
        One from a to b and one from b to a are two.
    """

    def __init__(self, store: StoreReader, name: str) -> None:
        graphs = store.manifest.graphs
        if name not in graphs:
            there = f"there are {', '.join(sorted(graphs))}" if graphs else "it has none"
            raise DataError(f"{store.path}: no graph {name!r}; {there}; `megacell convert --neighbours` keeps them")
        self.store, self.name = store, name
        self._key, self._record = graphs[name], store.manifest.neighbours[graphs[name]]
        self.cells, self.edges = self._record.cells, self._record.edges

    def __reduce__(self) -> tuple[Any, ...]:
        return Neighbours, (self.store, self.name)

    def __repr__(self) -> str:
        return f"Neighbours({self.name!r}, {self.edges:,} edges of {self.store!r})"

    def __len__(self) -> int:
        return len(self.store)

    @cached_property
    def _arrays(self) -> tuple[Array, Array, Array]:
        """Indptr, cells and weights, mapped."""
        return map_graph(self.store.path, self._key, self._record)

    def of(self, cell: int) -> tuple[Array, Array]:
        """Return the neighbours of one cell, in the order of its source, without a copy.

        Returns
        -------
        cells : uint32 | uint64 [n]
        weights : float32 | float64 [n]

        Raises
        ------
        DataError
            A cell that does not exist, or a damaged graph.
        """
        if not 0 <= cell < len(self):
            raise DataError(f"{self.store.path}: no cell {cell}; there are {len(self)}")
        indptr, cells, weights = self._arrays
        start, stop = (int(indptr[cell]), int(indptr[cell + 1])) if cell < self.cells else (0, 0)
        if not 0 <= start <= stop <= len(cells) or int(cells[start:stop].max(initial=0)) >= len(self):
            raise self._damaged()
        return cells[start:stop], weights[start:stop]

    def rows(self, cells: Any) -> sp.csr_matrix:
        """Return the edges of several cells.

        Parameters
        ----------
        cells : int array [n], bool array [cells] or slice
            In any order, repeats allowed.

        Returns
        -------
        csr_matrix float32 | float64 [n, cells of the store]
            A row's neighbours in the order of their source.

        Raises
        ------
        DataError
            A cell that does not exist, or a damaged graph.
        """
        wanted = self.store.numbers_of(cells)
        indptr, ids, weights = self._arrays
        out_indptr = np.zeros(len(wanted) + 1, np.int64)
        if not _count(wanted, indptr, len(ids), out_indptr):
            raise self._damaged()
        wide = len(self) > 1 << 31 or out_indptr[-1] >= 1 << 31  # scipy wants one type for indptr and indices
        out_ids = np.empty(out_indptr[-1], np.int64 if wide else np.int32)
        out_weights = np.empty(out_indptr[-1], weights.dtype)
        if not _copy(wanted, indptr, ids, weights, len(self), out_indptr, out_ids, out_weights):
            raise self._damaged()
        out = (out_weights, out_ids, out_indptr.astype(out_ids.dtype, copy=False))
        return sp.csr_matrix(out, (len(wanted), len(self)), copy=False)

    def sample(self, cells: Any, n: int = 1, seed: int = 0, *, weighted: bool = True) -> Array:
        """Draw neighbours of cells, with replacement.

        What is drawn depends on the seed, the cell and the number of the draw alone: not on the other cells of the
        call, their order, or `n`. A cell without neighbours gives itself; so does one whose weights are all zero, if
        they are to be gone by.

        Parameters
        ----------
        cells : int array [m], bool array [cells] or slice
        n : int
            Draws a cell.
        seed : int
            From 0 to 2^64 - 1.
        weighted : bool
            Draw a neighbour as often as its share of the cell's weights says; False draws all alike.

        Returns
        -------
        int64 [m, n]

        Raises
        ------
        DataError
            A cell that does not exist, negative weights to be gone by, or a damaged graph.
        UsageError
            A seed or number of draws out of range.
        """
        if not 0 <= seed < 1 << 64:
            raise UsageError(f"seed {seed}: give a whole number from 0 to 2^64 - 1")
        if n < 0:
            raise UsageError(f"{n} draws a cell: give 0 or more")
        wanted = self.store.numbers_of(cells)
        drawn = np.empty((len(wanted), n), np.int64)
        bad = _draw(wanted, *self._arrays, len(self), np.uint64(seed), weighted, drawn)
        if bad == _ASTRAY:
            raise self._damaged()
        if bad != _FINE:
            place = f"{self.store.path}: cell {bad}"
            raise DataError(f"{place} has negative weights in {self.name}; draw with weighted=False")
        return drawn

    def _damaged(self) -> DataError:
        return DataError(f"{self.store.path / FOLDER / self._key}: damaged; run `megacell verify {self.store.path}`")


_FINE, _ASTRAY = -1, -2


@compiled
def _count(wanted: Any, indptr: Any, edges: int, out_indptr: Any) -> bool:
    """Fill in where each cell's edges will begin; False if the graph's own indptr leads astray."""
    for i in range(len(wanted)):
        start = stop = 0
        if wanted[i] < len(indptr) - 1:
            start, stop = indptr[wanted[i]], indptr[wanted[i] + 1]
        if start < 0 or stop < start or stop > edges:
            return False
        out_indptr[i + 1] = out_indptr[i] + stop - start
    return True


@compiled
def _copy(
    wanted: Any, indptr: Any, ids: Any, weights: Any, cells: int, out_indptr: Any, out_ids: Any, out_weights: Any
) -> bool:
    """Copy edges to where `_count` found room; False for a neighbour that does not exist."""
    for i in range(len(wanted)):
        low = out_indptr[i]
        n = out_indptr[i + 1] - low
        for k in range(n):
            at = indptr[wanted[i]] + k
            if np.uint64(ids[at]) >= np.uint64(cells):
                return False
            out_ids[low + k] = ids[at]
            out_weights[low + k] = weights[at]
    return True


@compiled
def _draw(wanted: Any, indptr: Any, ids: Any, weights: Any, cells: int, seed: Any, weighted: bool, drawn: Any) -> int:
    """Draw neighbours: draw k of a cell is mix(mix(mix(seed + G) ^ cell * G) + (k + 1) * G), as a fraction of 2^64.

    Returns
    -------
    int
        _FINE, _ASTRAY if the graph leads outside its edges or cells, or the number of a cell with a negative weight.
    """
    key = mix(seed + ODD)
    for i in range(len(wanted)):
        start = stop = 0
        if wanted[i] < len(indptr) - 1:
            start, stop = indptr[wanted[i]], indptr[wanted[i] + 1]
        if start < 0 or stop < start or stop > len(ids):
            return _ASTRAY
        upto = np.cumsum(weights[start:stop].astype(np.float64)) if weighted else np.arange(1.0, stop - start + 1)
        if weighted and stop > start and weights[start:stop].min() < 0:
            return int(wanted[i])
        total = upto[-1] if stop > start else 0.0
        state = mix(key ^ (np.uint64(wanted[i]) * ODD))
        for k in range(drawn.shape[1]):
            if total > 0:
                share = np.float64(mix(state + np.uint64(k + 1) * ODD) >> np.uint64(11)) * 2.0**-53
                at = np.searchsorted(upto, share * total, side="right")
                cell = np.uint64(ids[start + min(at, stop - start - 1)])
                if cell >= np.uint64(cells):
                    return _ASTRAY
                drawn[i, k] = cell
            else:
                drawn[i, k] = wanted[i]
    return _FINE
