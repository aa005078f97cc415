# SPDX-License-Identifier: Apache-2.0
"""Memory that is used again: a fresh page costs more than what is written to it.

Batches of half a megabyte come from and go back to the operating system one by one otherwise, and clearing their pages
takes as long as ranking their cells.
"""

import threading
from typing import Any

import numpy as np

SLAB = 1 << 23  # bytes allocated at once: NumPy and the system back them with large pages, which are found faster
_SMALLEST = 12  # log2 of the bytes of the smallest block: a page


class Workspace(threading.local):
    """Working arrays that each thread keeps from one call to the next."""

    def __init__(self) -> None:
        self._arrays: dict[str, np.ndarray] = {}

    def get(self, name: str, size: int, dtype: Any, fill: float | None = None) -> np.ndarray:
        """Return an array [size] with any content, or with ``fill`` where it was allocated by this call."""
        array = self._arrays.get(name)
        if array is None or len(array) < size or array.dtype != dtype:
            array = np.empty(size + size // 4, dtype)
            if fill is not None:
                array.fill(fill)
            self._arrays[name] = array
        return array[:size]


class _Loan:
    """The base of all arrays over a block of a pool; the block is free again when the last of them is gone."""

    __slots__ = ("__array_interface__", "_block", "_free")

    def __init__(self, block: np.ndarray, free: list[np.ndarray]) -> None:
        self.__array_interface__ = block.__array_interface__
        self._block, self._free = block, free

    def __del__(self) -> None:
        self._free.append(self._block)


class Pool:
    """Allocates arrays in memory that no array uses any more; may be shared by threads.

    It keeps as much as was in use at once.
    """

    def __init__(self) -> None:
        self._free: dict[int, list[np.ndarray]] = {}

    def allocate(self, size: int, dtype: Any) -> np.ndarray:
        """Return an array [size] with any content."""
        dtype = np.dtype(dtype)
        size_class = max(_SMALLEST, (size * dtype.itemsize - 1).bit_length())
        free = self._free.setdefault(size_class, [])
        try:
            block = free.pop()
        except IndexError:
            block, *others = np.empty((max(1, SLAB >> size_class), 1 << size_class), np.uint8)
            free.extend(others)
        pooled: np.ndarray = np.asarray(_Loan(block, free))
        return pooled[: size * dtype.itemsize].view(dtype)


class RowBuffer:
    """Memory for `CellStore.rows` and `gather` to fill again and again: give it as their `allocate`.

    The arrays of one call are overwritten by the next.
    """

    def __init__(self) -> None:
        self._arrays: dict[Any, np.ndarray] = {}

    def __call__(self, size: int, dtype: Any) -> np.ndarray:
        """Return an array [size] of a type; its memory grows to the largest size so far."""
        array = self._arrays.get(dtype)
        if array is None or len(array) < size:
            array = self._arrays[dtype] = np.empty(size + size // 4, dtype)
        return array[:size]
