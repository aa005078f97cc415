# SPDX-License-Identifier: Apache-2.0
"""Rank value encoding: a cell's counts become its genes' tokens, most remarkable gene first. Compiled and exact.

value = count / cell total x 10,000 / gene median (Theodoris et al. 2023, Geneformer), computed in float64 in exactly
this order of operations; genes stand by descending value, ties by ascending token.

How it stays both fast and exact: one uint64 key a gene holds the value's leading bits, inverted, above the token, and
numpy's vectorised sort orders a cell's keys in one call. Only keys with equal leading bits can be in the wrong order;
they stand side by side afterwards, so that each such run is put in order by its full float64 values. One compiled loop
takes a cell through all of it before the next, while its keys are still in the processor's nearest cache.

Shapes: n cells, z stored values (non-zero counts), G genes of the input, V token numbers, T tokens.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from megacell.geneformer.buffers import Pool, WorkingRoom
from megacell.geneformer.ranking_kernels import SHARED, UNKNOWN, GenesTo, count_known, rank_rows
from megacell.geneformer.vector_sort import sort_address
from megacell.geneformer.vocabulary import Vocabulary
from megacell.store.errors import DataError, UsageError

if TYPE_CHECKING:
    import scipy.sparse as sp


class RankEncoder:
    """Rank value encoding for one list of genes under one vocabulary; reusable and safe to call from several threads.

    Parameters
    ----------
    gene_ids : sequence of str [G]
        Ids of the input's genes, in the order of its columns.
    symbols : sequence of str [G] or None
        Their symbols ("" where unknown), for genes without an Ensembl id.
    vocabulary : Vocabulary
    max_length : int, optional
        Longest cell in tokens, specials included; the vocabulary's own by default.

    Attributes
    ----------
    tokens : np.ndarray, int32 [G]
        Token of each gene, -1 where the vocabulary has none. Genes with the same token are summed before ranking.
    around : int
        Specials put around each cell.

    Raises
    ------
    UsageError
        ``max_length`` leaves no room for a gene.
    """

    def __init__(
        self,
        gene_ids: Sequence[str] | np.ndarray,
        symbols: Sequence[str] | np.ndarray | None,
        vocabulary: Vocabulary,
        max_length: int | None = None,
    ) -> None:
        self.vocabulary = vocabulary
        self.max_length = vocabulary.max_length if max_length is None else int(max_length)
        self.around = len(vocabulary.prefix) + len(vocabulary.suffix)
        if self.max_length <= self.around:
            raise UsageError(
                f"max_length {self.max_length} leaves no room beside {self.around} specials; make it larger"
            )
        self.tokens = vocabulary.tokens_of(gene_ids, symbols)
        self._genes_to = _genes_to(self.tokens, vocabulary)
        self._specials = (
            np.array(vocabulary.prefix, np.int32),
            np.array(vocabulary.suffix, np.int32),
            vocabulary.specials["pad"],
        )
        self._work, self._pool = WorkingRoom(), Pool()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_work": None, "_pool": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _work=WorkingRoom(), _pool=Pool())

    def known_genes(self, indptr: np.ndarray, genes: np.ndarray, counts: np.ndarray) -> np.ndarray:
        """Return how many different known genes each row has, int64 [n]; arguments as for `encode`."""
        lengths = np.empty(len(indptr) - 1, np.int64)
        seen = np.full(self.vocabulary.size, -1, np.int64)
        count_known((indptr, genes, counts), self.tokens, _is_shared(self.tokens), seen, lengths)
        return lengths

    def input_lengths(self, known: np.ndarray) -> np.ndarray:
        """Return the tokens, int64, of cells with ``known`` genes: cut at max_length, specials included, 0 for none."""
        known = np.asarray(known).astype(np.int64)
        return np.where(known > 0, np.minimum(known + self.around, self.max_length), 0)

    def encode(
        self,
        indptr: np.ndarray,
        genes: np.ndarray,
        counts: np.ndarray,
        dtype: type = np.int32,
        multiple_of: int = 1,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Encode rows of counts.

        Parameters
        ----------
        indptr : int64 [n + 1]
            From 0.
        genes : uint16 or uint32 [z]
            Column of each count: ascending within a row, no duplicates, as the store gives them.
        counts : float32 or float64 [z]
            Not negative, finite.
        dtype : type, default int32
            Of the tokens.
        multiple_of : int, default 1
            The tokens' array is filled up with pad tokens to a multiple of this.

        Returns
        -------
        tokens : dtype [T]
            Cell after cell, specials included; a cell without a known gene has no token at all.
        cu_lengths : int64 [n + 1]
            Cell i is ``tokens[cu_lengths[i]:cu_lengths[i + 1]]``.
        """
        get = self._work.get
        stored = np.diff(indptr)
        width = int(stored.max(initial=0))
        room = (
            get("keys", 2 * width, np.uint64),
            get("values", width, np.float64),
            get("medians", width, np.float64),
            get("sums", self.vocabulary.size, np.float64, fill=0.0),
        )
        most = int(np.minimum(stored + self.around, self.max_length).sum())
        out = self._pool.empty(-(-most // multiple_of) * multiple_of, dtype)
        cu_lengths = np.empty(len(indptr), np.int64)
        rows = indptr, genes, counts
        rank_rows(rows, self._genes_to, room, sort_address(), self._specials, self.max_length, cu_lengths, out)
        used = int(cu_lengths[-1])
        out = out[: -(-used // multiple_of) * multiple_of]
        out[used:] = self._specials[2]
        return out, cu_lengths


def _genes_to(tokens: np.ndarray, vocabulary: Vocabulary) -> GenesTo:
    """Return what the compiled loops look up by gene and token; see `megacell.geneformer.ranking_kernels`."""
    median_of_token = np.ones(vocabulary.size)
    median_of_token[vocabulary.tokens] = vocabulary.medians
    known = tokens >= 0
    of_gene = np.ones((len(tokens), 2))
    of_gene[known, 0] = median_of_token[tokens[known]]
    of_gene.view(np.uint64)[:, 1] = np.where(known, tokens.astype(np.uint64), np.uint64(UNKNOWN))
    of_gene.view(np.uint64)[_is_shared(tokens), 1] = SHARED
    gene_of_token = np.zeros(vocabulary.size, np.int64)
    gene_of_token[tokens[known]] = np.flatnonzero(known)
    low = np.uint64((1 << vocabulary.size.bit_length()) - 1)  # no token has all of these bits: only UNKNOWN
    return of_gene, tokens, gene_of_token, median_of_token, low


def _is_shared(tokens: np.ndarray) -> np.ndarray:
    """Return which genes have a token that others have too, bool [G]."""
    genes_of = np.bincount(tokens[tokens >= 0], minlength=tokens.max(initial=0) + 1)
    shared: np.ndarray = (tokens >= 0) & (genes_of[tokens] > 1)
    return shared


def rank_encode(
    csr: "sp.csr_matrix",
    gene_ids: Sequence[str] | np.ndarray,
    vocabulary: Vocabulary,
    max_length: int | None = None,
    symbols: Sequence[str] | np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Rank-value-encode a matrix of counts.

    Parameters
    ----------
    csr : scipy CSR matrix or array [n, G]
        Counts, not normalised: not negative, finite; the cell total is the sum of its row.
    gene_ids : sequence of str [G]
        Of the columns.
    vocabulary : Vocabulary
        Tokens and medians.
    max_length : int, optional
        The vocabulary's own by default.
    symbols : sequence of str [G], optional
        Of the columns; see `Vocabulary.tokens_of`.

    Returns
    -------
    tokens : np.ndarray, int32 [T]
        Cell after cell, specials included; a cell without a known gene has no token at all.
    cu_lengths : np.ndarray, int64 [n + 1]
        Cell i is ``tokens[cu_lengths[i]:cu_lengths[i + 1]]``.

    Raises
    ------
    DataError
        Negative counts, NaN or infinities; another number of genes than of columns.
    """
    if csr.shape[1] != len(gene_ids):
        raise DataError(f"rank_encode: {csr.shape[1]} columns but {len(gene_ids)} gene ids; give one id a column")
    if not csr.has_canonical_format:
        csr = csr.copy()
        csr.sum_duplicates()
    counts = csr.data if csr.data.dtype in (np.float32, np.float64) else csr.data.astype(np.float64)
    if len(counts) and not (counts.min() >= 0 and np.isfinite(counts).all()):
        raise DataError("rank_encode: the matrix holds negative values, NaN or infinities; give the raw counts")
    encoder = RankEncoder(gene_ids, symbols, vocabulary, max_length)
    return encoder.encode(csr.indptr.astype(np.int64), csr.indices.astype(np.uint32), counts)
