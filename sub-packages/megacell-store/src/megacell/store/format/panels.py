# SPDX-License-Identifier: Apache-2.0
"""Which genes each source measured: measured and zero is not the same as not measured."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from megacell.store.format.gene_table import MOST_GENES
from megacell.store.format.tables import open_table

Array = np.ndarray[Any, Any]


class PanelWriter:
    """Writes the distinct panels of a store's sources, numbered as they come, one a row group; holds none of them.

    A panel is a sorted uint32 array of gene numbers. A context manager.

    Parameters
    ----------
    path : Path
        The file to make.
    before : Path, optional
        The panels of the generation before, which keep their numbers.
    """

    def __init__(self, path: Path, before: Path | None = None) -> None:
        self._path, self._number = path, dict[bytes, int]()
        self._schema = pa.schema([("genes", pa.list_(pa.uint32()))])
        self._writer = pq.ParquetWriter(path, self._schema, compression="zstd")
        for panel in _read(before) if before else ():
            self.add(panel)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._writer.close()

    def add(self, panel: Array) -> int:
        """Return a panel's number; it is written unless an equal one was."""
        panel = np.ascontiguousarray(panel, np.uint32)
        key, length = xxhash.xxh3_128_digest(panel.tobytes()), len(self._number)
        number = self._number.setdefault(key, length)
        if number == length:
            offsets = pa.array([0, len(panel)], pa.int32())
            genes = pa.ListArray.from_arrays(offsets, pa.array(panel, pa.uint32()))
            self._writer.write_table(pa.table([genes], schema=self._schema))
        return number


def _read(path: Path) -> Iterator[Array]:
    with open_table(path) as file:
        for group in range(file.num_row_groups):
            yield _panel(file, group)


def read_panel(path: Path, number: int) -> Array:
    """Read one panel: sorted uint32.

    Raises
    ------
    DataError
        A link, a damaged table, or no such panel.
    """
    with open_table(path) as file:
        if number >= file.num_row_groups:
            raise ValueError(f"no panel {number}")
        return _panel(file, number)


def _panel(file: pq.ParquetFile, number: int) -> Array:
    """Read a row group, which is to hold one list of genes."""
    group = file.metadata.row_group(number)
    if group.num_rows != 1 or group.num_columns != 1 or group.column(0).num_values > MOST_GENES:
        raise ValueError(f"row group {number} is no list of genes")
    lists: pa.ListArray = file.read_row_group(number)["genes"].combine_chunks()
    genes = lists.flatten()
    if not pa.types.is_uint32(genes.type) or genes.null_count:
        raise ValueError(f"row group {number} is no list of genes")
    return np.asarray(genes.to_numpy(zero_copy_only=False), np.uint32)
