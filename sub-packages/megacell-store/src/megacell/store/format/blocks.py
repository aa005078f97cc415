# SPDX-License-Identifier: Apache-2.0
"""Blocks of CSR rows: cut so that they fit into memory, and spooled to disk to be turned into rows."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from megacell.core.jit import compiled

Array = np.ndarray[Any, Any]
Block = tuple[int, Array, Array, Array]
ROWS, VALUES = 1 << 14, 1 << 19  # a block's rows and values at most (one row is never cut)


@compiled
def scatter(columns_of: Any, rows: Any, data: Any, start: int, free: Any, columns: Any, values: Any) -> None:
    """Put values, in any order, to the next free place of their row; rows outside `free` are left out.

    So is what finds no room: a file that others write to meanwhile may hold more than it did when it was counted.

    Parameters
    ----------
    columns_of, rows : int32 [nnz]
    data : float [nnz]
    start : int
        Row number of ``free[0]``.
    free : int64 [rows]
        Where the next value of each row goes; counted up.
    columns, values : int32 [all], float [all]
        Filled.
    """
    for k in range(len(rows)):
        row = rows[k] - start
        if 0 <= row < len(free):
            at = free[row]
            if at < len(columns):
                columns[at] = columns_of[k]
                values[at] = data[k]
                free[row] = at + 1


def cut_blocks(start: int, indptr: Array, columns: Array, values: Array, rows: int) -> Iterator[Block]:
    """Yield CSR arrays, whose first row is row `start` of the matrix, in blocks, copied into memory."""
    first = 0
    while first < len(indptr) - 1:
        last = int(np.searchsorted(indptr, indptr[first] + VALUES, side="right")) - 1
        last = min(max(last, first + 1), first + rows, len(indptr) - 1)
        low, high = indptr[first], indptr[last]
        yield start + first, indptr[first : last + 1] - low, np.array(columns[low:high]), np.array(values[low:high])
        first = last


def spool(path: Path, dtype: np.dtype[Any], length: int) -> Array:
    """Return a temporary mapped array whose room on disk is reserved: a full disk is an error, not a bus error."""
    with open(path, "wb") as file:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.fileno(), 0, max(1, length * dtype.itemsize))
        else:  # macOS
            for low in range(0, length, VALUES):
                file.write(bytes(min(VALUES, length - low) * dtype.itemsize))
    return np.memmap(path, dtype, "r+", shape=(length,)).view(np.ndarray) if length else np.zeros(0, dtype)
