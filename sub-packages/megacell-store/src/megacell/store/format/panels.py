# SPDX-License-Identifier: Apache-2.0
"""Which genes each source measured: measured and zero is not the same as not measured."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from megacell.core.errors import DataError

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
    try:
        with pq.ParquetFile(path) as file:
            for group in range(file.num_row_groups):
                for lists in file.read_row_group(group)["genes"].chunks:
                    for i in range(len(lists)):
                        yield _numbers(lists.slice(i, 1))
    except (OSError, KeyError, pa.ArrowInvalid) as error:
        raise DataError(f"{path}: cannot be read ({error}); restore it or convert again") from None


def read_panel(path: Path, number: int) -> Array:
    """Read one panel: sorted uint32."""
    try:
        with pq.ParquetFile(path) as file:
            return _numbers(file.read_row_group(number)["genes"].combine_chunks())
    except (OSError, KeyError, IndexError, pa.ArrowInvalid) as error:
        raise DataError(f"{path}: cannot be read ({error}); restore it or convert again") from None


def _numbers(lists: pa.ListArray) -> Array:
    return np.asarray(lists.flatten().to_numpy(zero_copy_only=False), np.uint32)
