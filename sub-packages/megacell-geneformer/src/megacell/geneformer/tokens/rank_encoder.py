# SPDX-License-Identifier: Apache-2.0
"""Rank value encoding: a cell's counts become its genes' tokens, most remarkable gene first. Compiled and exact.

value = count / cell total x 10,000 / gene median (Theodoris et al. 2023, Geneformer), computed in float64 in exactly
this order of operations; genes stand by descending value, ties by ascending token.

How it stays both fast and exact: pairs of a gene and a small count have been put in order once for all, so that a cell
is ranked by sorting the 32-bit numbers of its pairs (`megacell.geneformer.pair_numbers` says which are too near to be
decided so). Other rows are sorted by the leading bits of their values. Either way, whatever is alike stands side by
side afterwards, and each such run is put in order by its full float64 values. One compiled loop takes a cell through
all of it before the next, while its keys are in the processor's nearest cache; it reads a store's files in place.

Shapes: n cells, z stored values (non-zero counts), G genes of the input, V token numbers, T tokens.
"""

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.sparse as sp

from megacell.core.buffers import Pool, Workspace
from megacell.core.errors import DataError
from megacell.core.vector_sort import sort_address
from megacell.geneformer.tokens.encoder import cut_lengths, length_limits
from megacell.geneformer.tokens.pair_numbers import MOST_OTHERS, number_pairs
from megacell.geneformer.tokens.rank_kernels import Layout, count_known, rank_rows, rank_rows_in_place
from megacell.geneformer.tokens.ties import Genes, RowWorkspace
from megacell.geneformer.vocabulary.vocabulary import Vocabulary
from megacell.store import CellStore
from megacell.store.read.gather import RowsInPlace
from megacell.store.read.reader import Allocate, CellReader


@dataclass(frozen=True, eq=False)
class RowsOfStore:
    """Rows in a store's mapped files: ``where``, of its `rows_in_place`, and the store, which keeps them mapped."""

    store: CellStore
    where: RowsInPlace


NONE = np.zeros(0, np.int64)
NOWHERE = RowsInPlace(NONE, NONE, NONE, np.zeros((0, 0), np.int64), 0)


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
        self.max_length, self.around = length_limits(vocabulary, max_length)
        self.tokens = vocabulary.tokens_of(gene_ids, symbols)
        self._genes = _genes(self.tokens, vocabulary)
        self._make_ready()

    def _make_ready(self) -> None:
        """Set what belongs to this process alone."""
        prefix, suffix = self.vocabulary.prefix, self.vocabulary.suffix
        self._layout = Layout(
            np.array(prefix, np.int32), np.array(suffix, np.int32), self.max_length - self.around,
            sort_address(np.uint32), sort_address(np.uint64),
        )  # fmt: skip
        self._here, self._gathered, self._pool = threading.local(), Workspace(), Pool()

    def __getstate__(self) -> dict[str, Any]:
        of_process = ("_layout", "_here", "_gathered", "_pool")
        return {name: value for name, value in self.__dict__.items() if name not in of_process}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._make_ready()

    def known_genes(self, indptr: np.ndarray, genes: np.ndarray, counts: np.ndarray) -> np.ndarray:
        """Return how many different known genes each row has, int64 [n]; arguments as for `encode`."""
        self._check(indptr, genes, len(self.tokens))
        lengths = np.empty(len(indptr) - 1, np.int64)
        seen = np.full(self.vocabulary.size, -1, np.int64)
        count_known(indptr, genes, counts, self._genes, seen, lengths)
        return lengths

    def input_lengths(self, known: np.ndarray) -> np.ndarray:
        """Return the tokens, int64, of cells with ``known`` genes: cut at max_length, specials included, 0 for none."""
        return cut_lengths(known, self.max_length, self.around)

    def encode(
        self,
        indptr: np.ndarray,
        genes: np.ndarray,
        counts: np.ndarray,
        dtype: Any = np.int32,
        allocate: Allocate | None = None,
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
        allocate : callable, optional
            Makes the array that begins with the tokens, of a size and dtype; a pool's memory by default.

        Returns
        -------
        tokens : dtype [T]
            Cell after cell, specials included; a cell without a known gene has no token at all.
        cu_lengths : int64 [n + 1]
            Cell i is ``tokens[cu_lengths[i]:cu_lengths[i + 1]]``.
        """
        if counts.dtype.itemsize == 1:
            counts = counts.astype(np.float32)  # only in a store's files does a byte of 255 stand for more
        self._check(indptr, genes, len(self._genes.pairs.by_gene))
        out, cu_lengths = self._out(indptr, dtype, allocate)
        work = self._workspace(int(np.diff(indptr).max(initial=0)))
        damaged = rank_rows(indptr, genes, counts, NOWHERE, self._genes, work, self._layout, cu_lengths, out)
        if damaged >= 0:
            raise DataError(f"row {damaged} has a gene beyond the {len(self.tokens)} that were named")
        return out[: cu_lengths[-1]], cu_lengths

    def encode_in_place(
        self, rows: RowsOfStore, dtype: Any = np.int32, allocate: Allocate | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Encode rows as they lie in a store's mapped files: what `encode` makes of their copies.

        Raises
        ------
        DataError
            A shard with numbers that cannot be right.
        """
        out, cu_lengths = self._out(rows.where.indptr, dtype, allocate)
        work = self._workspace(rows.where.longest)
        damaged = rank_rows_in_place(rows.where, self._genes, work, self._layout, cu_lengths, out)
        if damaged >= 0:
            raise rows.store.damaged(int(rows.where.shard[damaged]))
        return out[: cu_lengths[-1]], cu_lengths

    def encode_cells(
        self, reader: CellReader, cells: np.ndarray, dtype: Any = np.int32, allocate: Allocate | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Encode cells by number: in place where their store allows it, else from copies of their rows."""
        if isinstance(reader, CellStore) and (where := reader.rows_in_place(cells)) is not None:
            return self.encode_in_place(RowsOfStore(reader, where), dtype, allocate)
        rows = reader.gather(cells, allocate=lambda size, kind: self._gathered.get(f"gathered {kind}", size, kind))
        return self.encode(*rows, dtype, allocate)

    def _check(self, indptr: np.ndarray, genes: np.ndarray, known: int) -> None:
        """Raise DataError for rows that would lead the compiled loops out of arrays; they look at nothing again."""
        steps = np.diff(indptr, prepend=0, append=len(genes))
        if steps.min() < 0:
            raise DataError("rows that do not ascend in their values; give a matrix whose indptr does")
        if len(genes) and not 0 <= genes.min() <= genes.max() < known:
            row = int(np.searchsorted(indptr, np.argmax((genes < 0) | (genes >= known)), side="right")) - 1
            raise DataError(f"row {row} has a gene beyond the {len(self.tokens)} that were named")

    def _out(self, indptr: np.ndarray, dtype: Any, allocate: Allocate | None) -> tuple[np.ndarray, np.ndarray]:
        """Return arrays for the tokens and for the ends of rows."""
        n = len(indptr) - 1
        most = min(n * self.max_length, int(indptr[-1]) + n * self.around)
        return (allocate or self._pool.allocate)(most, dtype), np.empty(n + 1, np.int64)

    def _workspace(self, width: int) -> RowWorkspace:
        """Return this thread's arrays to work on rows of up to ``width`` counts in."""
        work: RowWorkspace | None = getattr(self._here, "work", None)
        if work is None or len(work.counts) < width:
            width += width // 4
            work = self._here.work = RowWorkspace(
                short=np.empty(width + MOST_OTHERS, np.uint32),
                long=np.empty(2 * width, np.uint64),
                counts=np.empty(width),
                values=np.empty(2 * width),
                found=np.empty(width, np.int64),
                tied=np.empty(2 * width, np.int64),
                sums=np.zeros(self.vocabulary.size),
            )
        return work


def _genes(tokens: np.ndarray, vocabulary: Vocabulary) -> Genes:
    """Return what the compiled loops look up by gene."""
    median_of_token = np.ones(vocabulary.size)
    median_of_token[vocabulary.tokens] = vocabulary.medians
    medians = np.where(tokens >= 0, median_of_token[tokens], np.inf)
    genes_of = np.bincount(tokens[tokens >= 0], minlength=vocabulary.size)
    shared = (tokens >= 0) & (genes_of[tokens] > 1)
    return Genes(tokens, medians, shared, bool(shared.any()), number_pairs(tokens, medians, shared))


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
    encoder = _encoder(gene_ids, symbols, vocabulary, max_length)
    return encoder.encode(csr.indptr.astype(np.int64), csr.indices.astype(np.uint32), counts)


_last: "tuple[Vocabulary, int | None, list[str], list[str] | None, RankEncoder] | None" = None


def _encoder(
    gene_ids: Sequence[str] | np.ndarray,
    symbols: Sequence[str] | np.ndarray | None,
    vocabulary: Vocabulary,
    max_length: int | None,
) -> RankEncoder:
    """Return an encoder; that of the call before where it fits, since making one takes as long as many cells."""
    global _last
    ids, names = list(gene_ids), None if symbols is None else list(symbols)
    last = _last
    if last is None or last[0] is not vocabulary or last[1:4] != (max_length, ids, names):
        last = _last = vocabulary, max_length, ids, names, RankEncoder(gene_ids, symbols, vocabulary, max_length)
    return last[4]
