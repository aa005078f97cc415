# SPDX-License-Identifier: Apache-2.0
"""Which genes each source measured: measured and zero is not the same as not measured."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from megacell.store.durable import TEMPORARY, flush_file, move_into_place
from megacell.store.errors import DataError

Array = np.ndarray[Any, Any]


class Panels:
    """The distinct panels of a store's sources, numbered; equal ones stand once.

    A panel is a sorted uint32 array of gene numbers.
    """

    def __init__(self, panels: Sequence[Array] = ()) -> None:
        self.panels = list(panels)
        self._number = {panel.tobytes(): i for i, panel in enumerate(self.panels)}

    def add(self, panel: Array) -> int:
        """Return a panel's number."""
        panel = np.ascontiguousarray(panel, np.uint32)
        number = self._number.setdefault(panel.tobytes(), len(self.panels))
        if number == len(self.panels):
            self.panels.append(panel)
        return number

    def write(self, path: Path) -> None:
        """Write the panels, one a row group, so that one can be read without the others."""
        temporary = path.with_name(path.name + TEMPORARY)
        schema = pa.schema([("genes", pa.list_(pa.uint32()))])
        with pq.ParquetWriter(temporary, schema, compression="zstd") as writer:
            for panel in self.panels:
                offsets = pa.array([0, len(panel)], pa.int32())
                genes = pa.ListArray.from_arrays(offsets, pa.array(panel, pa.uint32()))
                writer.write_table(pa.table([genes], schema=schema))
        flush_file(temporary)
        move_into_place(temporary, path)

    @classmethod
    def read(cls, path: Path) -> "Panels":
        """Read all panels of a store."""
        try:
            return cls([_numbers(part) for part in pq.read_table(path)["genes"].chunks for part in _rows(part)])
        except (OSError, KeyError, pa.ArrowInvalid) as error:
            raise DataError(f"{path}: cannot be read ({error}); restore it or convert again") from None


def read_panel(path: Path, number: int) -> Array:
    """Read one panel: sorted uint32."""
    try:
        with pq.ParquetFile(path) as file:
            return _numbers(file.read_row_group(number)["genes"].combine_chunks())
    except (OSError, KeyError, IndexError, pa.ArrowInvalid) as error:
        raise DataError(f"{path}: cannot be read ({error}); restore it or convert again") from None


def _rows(lists: pa.ListArray) -> list[pa.ListArray]:
    return [lists.slice(i, 1) for i in range(len(lists))]


def _numbers(lists: pa.ListArray) -> Array:
    return np.asarray(lists.flatten().to_numpy(zero_copy_only=False), np.uint32)
