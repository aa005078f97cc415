# SPDX-License-Identifier: Apache-2.0
"""How many known genes each cell of a store has under a vocabulary: counted once, kept in a cache, mapped."""

import contextlib
import logging
import os
import secrets
from pathlib import Path

import numpy as np

from megacell.geneformer.token_folder import encoder_for
from megacell.geneformer.vocabulary import Vocabulary
from megacell.store import CellStore

CELLS_AT_ONCE = 4096
LARGEST = np.iinfo(np.uint16).max

log = logging.getLogger(__name__)


def cache_directory() -> Path:
    """Return where counts are kept: $MEGACELL_CACHE, else megacell under $XDG_CACHE_HOME or ~/.cache."""
    if chosen := os.environ.get("MEGACELL_CACHE"):
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "megacell"


def token_lengths(store: CellStore, vocabulary: Vocabulary) -> np.ndarray:
    """Return how many known genes each cell has, without specials and before any cut.

    Counted on the first call for a store's generation and a vocabulary, then mapped from the cache. A cache that cannot
    be written costs the count, not the run.

    Returns
    -------
    np.ndarray, uint16 [cells]
        65,535 stands for that many or more.
    """
    path = cache_directory() / "lengths" / f"{store.digest}-{vocabulary.hash}.npy"
    lengths = mapped(path, np.dtype(np.uint16), len(store))
    return keep(path, _count(store, vocabulary)) if lengths is None else lengths


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


def _count(store: CellStore, vocabulary: Vocabulary) -> np.ndarray:
    encoder = encoder_for(store, vocabulary)
    lengths = np.empty(len(store), np.uint16)
    for first in range(0, len(store), CELLS_AT_ONCE):
        cells = np.arange(first, min(first + CELLS_AT_ONCE, len(store)))
        lengths[cells] = np.minimum(encoder.known_genes(*store.gather(cells)), LARGEST)
    return lengths
