# SPDX-License-Identifier: Apache-2.0
"""What makes tokens of cells: ranking counts (`RankEncoder`), or copying tokens of a corpus (`TokenCopier`)."""

from typing import Any, Protocol

import numpy as np

from megacell.core.errors import UsageError
from megacell.geneformer.vocabulary.vocabulary import Vocabulary
from megacell.store.read.reader import Allocate, CellReader


class CellEncoder(Protocol):
    """Makes tokens of cells; safe to call from several threads.

    Attributes
    ----------
    vocabulary : Vocabulary
    max_length : int
        Longest cell in tokens, specials included.
    """

    vocabulary: Vocabulary
    max_length: int

    def known_genes(self, indptr: np.ndarray, genes: np.ndarray, counts: np.ndarray) -> np.ndarray:
        """Return how many different known genes each row has, int64 [n]; arguments as for `encode`."""

    def input_lengths(self, known: np.ndarray) -> np.ndarray:
        """Return the tokens, int64, of cells with ``known`` genes: cut at max_length, specials included, 0 for none."""

    def encode(
        self,
        indptr: np.ndarray,
        genes: np.ndarray,
        counts: np.ndarray,
        dtype: Any = np.int32,
        allocate: Allocate | None = None,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Encode rows as `CellReader.gather` returns them.

        Parameters
        ----------
        indptr : int64 [n + 1]
        genes : integers [z]
        counts : float32 or float64 [z]
        dtype : type, default int32
            Of the tokens.
        allocate : callable, optional
            Makes the array that begins with the tokens, of a size and dtype.

        Returns
        -------
        tokens : dtype [T]
            Cell after cell, specials included; a cell without a known gene has no token at all.
        cu_lengths : int64 [n + 1]
            Cell i is ``tokens[cu_lengths[i]:cu_lengths[i + 1]]``.
        """

    def encode_cells(
        self, reader: CellReader, cells: np.ndarray, dtype: Any = np.int32, allocate: Allocate | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Encode cells by number, int64 [n]; what `encode` makes of their rows."""


def length_limits(vocabulary: Vocabulary, max_length: int | None) -> tuple[int, int]:
    """Return the longest cell in tokens (the vocabulary's own by default), and how many of these are specials.

    Raises
    ------
    UsageError
        It leaves no room for a gene.
    """
    longest = vocabulary.max_length if max_length is None else int(max_length)
    specials = len(vocabulary.prefix) + len(vocabulary.suffix)
    if longest <= specials:
        raise UsageError(f"max_length {longest} leaves no room beside {specials} specials; make it larger")
    return longest, specials


def cut_lengths(known: np.ndarray, max_length: int, specials: int) -> np.ndarray:
    """Return the tokens, int64, of cells with ``known`` genes: see `CellEncoder.input_lengths`."""
    known = np.asarray(known).astype(np.int64)
    return np.where(known > 0, np.minimum(known + specials, max_length), 0)
