# SPDX-License-Identifier: Apache-2.0
"""How fast random cells come out of a store, beside what plain NumPy and SciPy do with the same cells."""

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import scipy.sparse as sp

from megacell.core.buffers import RowBuffer
from megacell.store.format.shard import FOLDER
from megacell.store.read.cell_store import CellStore
from megacell.store.read.mapped_shard import Shard

Array = np.ndarray[Any, Any]
BATCH, REPEATS = 64, 5
IN_MEMORY = 200_000_000  # values up to which scipy's CSR in memory is measured too


def rates(
    methods: Mapping[str, Callable[[Array], object]], cells: int, seconds: float, batch: int = BATCH
) -> dict[str, dict[str, float]]:
    """Return rows a second and a CPU-second of functions of random cells: medians of five runs, after one to warm up.

    The methods take turns, so that none has a quieter machine than another.

    Parameters
    ----------
    methods : mapping of callables
        Each takes int64 [batch], numbers below `cells`.
    cells : int
    seconds : float
        Of all runs of a method together.
    """
    random = np.random.default_rng(0)
    walls: dict[str, list[float]] = {name: [] for name in methods}
    cpus: dict[str, list[float]] = {name: [] for name in methods}
    for run in range(REPEATS + 1):
        for name, work in methods.items():
            rows, wall, cpu = 0, time.perf_counter(), time.process_time()
            while not rows or time.perf_counter() - wall < seconds / REPEATS:  # one batch at least
                work(random.integers(0, cells, batch))
                rows += batch
            if run:
                walls[name].append(rows / (time.perf_counter() - wall))
                cpus[name].append(rows / (time.process_time() - cpu))
    median = statistics.median
    return {n: {"rows_per_second": median(walls[n]), "rows_per_cpu_second": median(cpus[n])} for n in methods}


def numpy_slices(store: CellStore) -> Callable[[Array], sp.csr_matrix]:
    """Return what a careful user writes by hand over the same maps: slices a row, joined to CSR."""
    shards = [Shard(store.path, record) for record in store.manifest.shards]
    first = np.concatenate([[0], np.cumsum([record.cells for record in store.manifest.shards])])

    def read(cells: Array) -> sp.csr_matrix:
        genes, counts, lengths = [], [], [0]
        for cell in cells.tolist():
            number = int(np.searchsorted(first, cell, side="right")) - 1
            shard, row = shards[number], cell - first[number]
            start, stop = shard.indptr[row], shard.indptr[row + 1]
            values = shard.counts[start:stop].astype(np.float32)
            if shard.counts.dtype == np.uint8:
                large = np.flatnonzero(values == 255)
                if len(large):
                    values[large] = shard.large[np.searchsorted(shard.positions, start + large)]
            genes.append(shard.indices[start:stop])
            counts.append(values)
            lengths.append(stop - start)
        indices = np.concatenate(genes).astype(np.int32)
        return sp.csr_matrix((np.concatenate(counts), indices, np.cumsum(lengths)), (len(cells), store.shape[1]))

    return read


def stored_slices(store: CellStore) -> Callable[[Array], tuple[Array, Array, Array]]:
    """Return the least that NumPy can do with the maps: slices as they are stored, joined; large counts not decoded."""
    shards = [Shard(store.path, record) for record in store.manifest.shards]
    first = np.concatenate([[0], np.cumsum([record.cells for record in store.manifest.shards])])

    def read(cells: Array) -> tuple[Array, Array, Array]:
        if len(shards) == 1:
            shard, starts, stops = shards[0], shards[0].indptr[cells].tolist(), shards[0].indptr[cells + 1].tolist()
            spans = [(shard, start, stop) for start, stop in zip(starts, stops, strict=True)]
        else:
            number = np.searchsorted(first, cells, side="right") - 1
            rows = zip([shards[n] for n in number.tolist()], (cells - first[number]).tolist(), strict=True)
            spans = [(shard, int(shard.indptr[row]), int(shard.indptr[row + 1])) for shard, row in rows]
        genes = np.concatenate([shard.indices[start:stop] for shard, start, stop in spans])
        counts = np.concatenate([shard.counts[start:stop] for shard, start, stop in spans])
        return genes, counts, np.cumsum([0] + [stop - start for _, start, stop in spans])

    return read


def bench_read(store: CellStore, seconds: float = 5.0) -> dict[str, Any]:
    """Measure random batches of 64 cells as CSR, one process, warm pages.

    Returns
    -------
    dict
        By method: rows_per_second, rows_per_cpu_second; and the store's cells, genes and values a cell.
    """
    buffer = RowBuffer()
    methods: dict[str, Callable[[Array], object]] = {
        "store.rows": store.rows,
        "store.rows into a buffer": lambda cells: store.rows(cells, buffer),
        "numpy slices of the same maps": numpy_slices(store),
    }
    if store.manifest.values <= IN_MEMORY:
        whole = store.rows(slice(None))
        methods["scipy CSR in memory"] = whole.__getitem__
    random = np.random.default_rng(1).integers(0, len(store), BATCH)
    for name, method in methods.items():
        rows: Any = method(random)
        if (rows != store.rows(random)).nnz:
            raise AssertionError(f"{name} reads other values in {store.path / FOLDER}")
    methods["numpy slices as stored, large counts missing"] = stored_slices(store)
    figures = rates(methods, len(store), seconds)
    cells, genes = store.shape
    return {"cells": cells, "genes": genes, "values_per_cell": store.manifest.values / max(1, cells), **figures}
