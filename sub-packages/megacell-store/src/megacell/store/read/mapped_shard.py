# SPDX-License-Identifier: Apache-2.0
"""One shard, memory-mapped for reading."""

from pathlib import Path
from typing import Any

import numpy as np

from megacell.core.errors import DataError
from megacell.store.format.manifest import ShardRecord
from megacell.store.format.shard import FOLDER, map_array
from megacell.store.read.gather import FIELDS, KINDS


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
        if len(self.indptr) != record.cells + 1 or not len(self.indices) == len(self.counts) == record.values:
            raise DataError(f"{self.folder}: arrays of different lengths; run `megacell verify`")

    def map(self, name: str) -> np.ndarray[Any, Any]:
        """Map one array, as a plain ndarray over the mapped pages."""
        return map_array(self.folder / name, self.record.files.get(name))

    def table_row(self, first: int) -> np.ndarray[Any, Any]:
        """Return what `gather` needs to know: int64 [FIELDS], in the order of gather's field numbers."""
        arrays = (self.indptr, self.indices, self.counts, self.positions, self.large)
        indptr, indices, counts, positions, large = (array.ctypes.data for array in arrays)
        row: tuple[int, ...] = (first, self.record.cells, self.record.values, indptr)
        row += (indices, KINDS[self.indices.dtype.name], counts, KINDS[self.counts.dtype.name])
        row += (positions, large, len(self.positions))
        return np.array(row, np.int64).reshape(FIELDS)
