# SPDX-License-Identifier: Apache-2.0
"""Arrays that are kept in a cache folder of the user's, under the hash of what they were computed from."""

import logging
import os
from pathlib import Path

import numpy as np

from megacell.core.files import whole_file

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
    except OSError as error:
        log.warning("%s: cannot be written (%s); set MEGACELL_CACHE to save counting again", path, error)
    return array


def mapped(path: Path, dtype: np.dtype, size: int) -> np.ndarray | None:
    """Map an array of the cache, or return None where there is none or it is broken."""
    try:
        array: np.ndarray = np.load(path, mmap_mode="r")
    except (OSError, ValueError, EOFError):
        return None
    return array if array.dtype == dtype and array.shape == (size,) else None
