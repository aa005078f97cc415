# SPDX-License-Identifier: Apache-2.0
"""Asking the system for the pages of cells before they are read: for stores larger than memory."""

import mmap
from typing import Any

import numpy as np

from megacell.store.shard import Shard

Array = np.ndarray[Any, Any]
_GAP = 1 << 16  # pages so near to each other are asked for together


def will_need(shard: Shard, rows: Array) -> int:
    """Tell the system which pages of a shard's values will be read soon, and return their bytes; 0 where it cannot.

    Parameters
    ----------
    shard : Shard
    rows : int64 [n]
        Within the shard.
    """
    if not hasattr(mmap.mmap, "madvise"):
        return 0
    rows = np.unique(rows)
    starts, stops = shard.indptr[rows], shard.indptr[rows + 1]
    asked = 0
    for array in (shard.indices, shard.counts):
        memory, offset = _mapping(array)
        if memory is None:
            continue
        low = (offset + starts * array.itemsize) // mmap.PAGESIZE * mmap.PAGESIZE
        high = offset + stops * array.itemsize
        cuts = np.flatnonzero(low[1:] > np.maximum.accumulate(high)[:-1] + _GAP) + 1
        firsts, lasts = low[np.append(0, cuts)], np.maximum.accumulate(high)[np.append(cuts, len(high)) - 1]
        for first, last in zip(firsts.tolist(), lasts.tolist(), strict=True):
            length = min(last, len(memory)) - first
            if length > 0:
                memory.madvise(mmap.MADV_WILLNEED, first, length)
                asked += length
    return asked


def _mapping(array: Array) -> tuple[mmap.mmap | None, int]:
    """Return the map that an array lies in, and the array's first byte within it."""
    base: Any = array
    while isinstance(base, np.ndarray):
        base = base.base
    if not isinstance(base, mmap.mmap):
        return None, 0
    whole = np.frombuffer(base, np.uint8)
    return base, array.ctypes.data - whole.ctypes.data
