# SPDX-License-Identifier: Apache-2.0
"""Asking the system for the pages of cells before they are read: for stores larger than memory."""

import mmap
import os
from typing import Any

import numpy as np

from megacell.store.read.mapped_shard import Shard

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
    if not hasattr(os, "posix_fadvise"):
        return 0
    rows = np.unique(rows)
    starts, stops = shard.indptr[rows], shard.indptr[rows + 1]
    asked = 0
    for name, array in (("indices.npy", shard.indices), ("counts.npy", shard.counts)):
        offset = shard.record.files[name].bytes - array.nbytes  # of the first value within the file
        low = (offset + starts * array.itemsize) // mmap.PAGESIZE * mmap.PAGESIZE
        high = offset + stops * array.itemsize
        cuts = np.flatnonzero(low[1:] > np.maximum.accumulate(high)[:-1] + _GAP) + 1
        firsts, lasts = low[np.append(0, cuts)], np.maximum.accumulate(high)[np.append(cuts, len(high)) - 1]
        file = os.open(shard.folder / name, os.O_RDONLY)
        try:
            for first, last in zip(firsts.tolist(), lasts.tolist(), strict=True):
                os.posix_fadvise(file, first, last - first, os.POSIX_FADV_WILLNEED)
                asked += last - first
        finally:
            os.close(file)
    return asked
