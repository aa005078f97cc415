# SPDX-License-Identifier: Apache-2.0
"""One shard, memory-mapped for reading."""

from pathlib import Path
from typing import Any

import numpy as np

from megacell.core.errors import DataError
from megacell.store.format.manifest import ShardRecord
from megacell.store.format.shard import FOLDER, map_array
from megacell.store.read.gather import FIELDS, KINDS

# the types that compiled loops take for granted: they go by addresses
TYPES = {
    "indptr.npy": ("int64",),
    "indices.npy": ("uint16", "uint32"),
    "counts.npy": tuple(KINDS),
    "overflow_positions.npy": ("int64",),
    "overflow_values.npy": ("uint32",),
    "cell_hash.npy": ("uint64",),
    "panels.npy": ("uint32",),
}


class Shard:
    """One shard's arrays, mapped read-only; sizes are checked against the manifest as they are opened."""

    def __init__(self, store: Path, record: ShardRecord) -> None:
        self.folder, self.record = store / FOLDER / record.name, record
        self.indptr = self.map("indptr.npy")
        self.indices = self.map("indices.npy")
        self.counts = self.map("counts.npy")
        small = self.counts.dtype == np.uint8
        self.positions = self.map("overflow_positions.npy") if small else np.zeros(0, np.int64)
        self.large = self.map("overflow_values.npy") if small else np.zeros(0, np.uint32)
        whole = len(self.indices) == len(self.counts) == record.values and len(self.positions) == len(self.large)
        if len(self.indptr) != record.cells + 1 or not whole:
            raise DataError(f"{self.folder}: arrays of different lengths; run `megacell verify`")

    def map(self, name: str) -> np.ndarray[Any, Any]:
        """Map one array, as a plain ndarray over the mapped pages."""
        return map_array(self.folder / name, self.record.files.get(name), TYPES[name])

    def table_row(self, first: int) -> np.ndarray[Any, Any]:
        """Return what `gather` needs to know: int64 [FIELDS], in the order of gather's field numbers."""
        arrays = (self.indptr, self.indices, self.counts, self.positions, self.large)
        indptr, indices, counts, positions, large = (array.ctypes.data for array in arrays)
        row: tuple[int, ...] = (first, self.record.cells, self.record.values, indptr)
        row += (indices, KINDS[self.indices.dtype.name], counts, KINDS[self.counts.dtype.name])
        row += (positions, large, len(self.positions))
        return np.array(row, np.int64).reshape(FIELDS)


def map_cells(store: Path, record: ShardRecord, name: str) -> np.ndarray[Any, Any]:
    """Map one of a shard's arrays that have an entry a cell, without the others: `cell_hash.npy` or `panels.npy`.

    Raises
    ------
    DataError
        It is not as the manifest says, or of another length than the shard.
    """
    path = store / FOLDER / record.name / name
    array = map_array(path, record.files.get(name), TYPES[name])
    if len(array) != record.cells:
        raise DataError(f"{path}: {len(array):,} entries for {record.cells:,} cells; run `megacell verify {store}`")
    return array


def map_sources(store: Path, record: ShardRecord, sources: int) -> np.ndarray[Any, Any]:
    """Map the number of the source of each of a shard's cells: uint32 [cells], all below `sources`.

    Raises
    ------
    DataError
        As `map_cells`, or a source that does not exist.
    """
    array = map_cells(store, record, "panels.npy")
    if len(array) and int(array.max()) >= sources:
        path = store / FOLDER / record.name / "panels.npy"
        raise DataError(f"{path}: names source {array.max()} of {sources}; run `megacell verify {store}`")
    return array
