# SPDX-License-Identifier: Apache-2.0
"""Arrays that are kept in a cache folder of the user's, under the hash of what they were computed from.

A file is what `np.save` writes, and the XXH3-64 of the array's bytes behind it.
"""

import logging
import os
from pathlib import Path

import numpy as np
import xxhash

from megacell.core.files import whole_file

LARGEST = 32  # bytes behind an array that are looked at; a digest has 8
log = logging.getLogger(__name__)


def cache_directory() -> Path:
    """Return the cache folder: $MEGACELL_CACHE, else megacell under $XDG_CACHE_HOME or ~/.cache."""
    if chosen := os.environ.get("MEGACELL_CACHE"):
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "megacell"


def keep(path: Path, array: np.ndarray) -> np.ndarray:
    """Write an array to the cache, whole or not at all, and return it; a cache that cannot be written is a warning."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(path) as file:
            np.save(file, array)
            file.write(_digest(array))
    except OSError as error:
        log.warning("%s: cannot be written (%s); set MEGACELL_CACHE to save counting again", path, error)
    return array


def mapped(path: Path, dtype: np.dtype, size: int) -> np.ndarray | None:
    """Map an array of the cache, or return None where there is none or its bytes are not those that were kept."""
    try:
        array = np.load(path, mmap_mode="r")
        if not isinstance(array, np.memmap) or array.dtype != dtype or array.shape != (size,):
            return None
        with open(path, "rb") as file:
            file.seek(array.offset + array.nbytes)
            return array if file.read(LARGEST) == _digest(array) else None
    except (OSError, ValueError, EOFError):
        return None


def _digest(array: np.ndarray) -> bytes:
    return xxhash.xxh3_64_digest(np.ascontiguousarray(array).data)
