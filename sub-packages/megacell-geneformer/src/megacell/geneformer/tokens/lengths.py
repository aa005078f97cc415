# SPDX-License-Identifier: Apache-2.0
"""How many known genes each cell of a store has under a vocabulary: counted once, kept in a cache, mapped."""

import numpy as np

from megacell.core.cache import cache_directory, keep, mapped
from megacell.geneformer.tokens.token_dataset import encoder_for
from megacell.geneformer.vocabulary.vocabulary import Vocabulary
from megacell.store.read.reader import CellReader

CELLS_AT_ONCE = 4096
LARGEST = np.iinfo(np.uint16).max


def token_lengths(store: CellReader, vocabulary: Vocabulary) -> np.ndarray:
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


def _count(store: CellReader, vocabulary: Vocabulary) -> np.ndarray:
    encoder = encoder_for(store, vocabulary)
    lengths = np.empty(len(store), np.uint16)
    for first in range(0, len(store), CELLS_AT_ONCE):
        cells = np.arange(first, min(first + CELLS_AT_ONCE, len(store)))
        lengths[cells] = np.minimum(encoder.known_genes(*store.gather(cells)), LARGEST)
    return lengths
