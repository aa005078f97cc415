# SPDX-License-Identifier: Apache-2.0
"""Arrays that are kept in a cache folder of the user's, under the hash of what they were computed from."""

import contextlib
import logging
import os
import secrets
from pathlib import Path

import numpy as np

log = logging.getLogger(__name__)


def cache_directory() -> Path:
    """Return where counts are kept: $MEGACELL_CACHE, else megacell under $XDG_CACHE_HOME or ~/.cache."""
    if chosen := os.environ.get("MEGACELL_CACHE"):
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "megacell"


def keep(path: Path, array: np.ndarray) -> np.ndarray:
    """Write an array to the cache, whole or not at all, and return it; a cache that cannot be written is a warning."""
    work = path.with_name(f"{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with work.open("wb") as file:
            np.save(file, array)
        work.replace(path)
    except OSError as error:
        log.warning("%s: cannot be written (%s); set MEGACELL_CACHE to save counting again", path, error)
        with contextlib.suppress(OSError):
            work.unlink()
    return array


def mapped(path: Path, dtype: np.dtype, size: int) -> np.ndarray | None:
    """Map an array of the cache, or return None where there is none or it is broken."""
    try:
        array: np.ndarray = np.load(path, mmap_mode="r")
    except (OSError, ValueError, EOFError):
        return None
    return array if array.dtype == dtype and array.shape == (size,) else None
