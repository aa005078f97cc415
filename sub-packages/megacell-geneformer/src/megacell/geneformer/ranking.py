# SPDX-License-Identifier: Apache-2.0
"""Rank value encoding: a cell's counts become its genes' tokens, most remarkable gene first. Compiled and exact.

value = count / cell total x 10,000 / gene median (Theodoris et al. 2023, Geneformer), computed in float64 in exactly
this order of operations; genes stand by descending value, ties by ascending token.

How it stays both fast and exact: one uint64 key a gene holds the value's leading bits, inverted, above the token, and
numpy's vectorised sort orders a cell's keys in one call. Only keys with equal leading bits can be in the wrong order;
they stand side by side afterwards, so that each such run is put in order by its full float64 values.

Shapes: n cells, z stored values (non-zero counts), G genes of the input, V token numbers, T tokens.
"""

import threading
from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

from megacell.geneformer.compiling import compiled
from megacell.geneformer.vocabulary import Vocabulary
from megacell.store.errors import DataError, UsageError

if TYPE_CHECKING:
    import scipy.sparse as sp

TARGET_SUM = 10_000.0  # Geneformer's normalisation
SHARED = 1 << 30  # flag on a gene's token: other genes of the input have the same one
UNKNOWN = -1


@compiled
def row_total(counts):
    """Sum a row's counts in float64, in four interleaved strands (exact, so order-free, for whole counts)."""
    a = b = c = d = 0.0
    stop = len(counts) // 4 * 4
    for j in range(0, stop, 4):
        a += counts[j]
        b += counts[j + 1]
        c += counts[j + 2]
        d += counts[j + 3]
    for j in range(stop, len(counts)):
        a += counts[j]
    return (a + b) + (c + d)


@compiled
def _known_values(genes, counts, token_of_gene, median_of_gene, sums, tokens, values, medians):
    """Write tokens and values of one row's known genes, and return how many they are.

    Genes that share a token are summed in ``sums`` (float64 [V], all zero before and after). ``medians`` is working
    room: collected apart from the arithmetic, which the compiler vectorises then. (Rows come as slices for the same
    reason: an index that cannot be negative needs no check.)
    """
    known = 0
    shared = False
    for j in range(len(genes)):
        token = token_of_gene[genes[j]]
        tokens[known] = token
        values[known] = counts[j]
        medians[known] = median_of_gene[genes[j]]
        known += (token >= 0) & (counts[j] > 0)
        shared |= token >= SHARED
    if shared:
        known = _sum_shared(tokens, values, medians, known, sums)
    total = row_total(counts)
    for i in range(known):
        values[i] = values[i] / total * TARGET_SUM / medians[i]
    return known


@compiled
def _sum_shared(tokens, values, medians, known, sums):
    """Sum the counts of equal tokens in the place of the first of them; return how many are left."""
    kept = 0
    for i in range(known):
        token = tokens[i]
        if token >= SHARED:
            plain = token & (SHARED - 1)
            is_first = sums[plain] == 0.0
            sums[plain] += values[i]
            if not is_first:
                continue
        tokens[kept], values[kept], medians[kept] = token, values[i], medians[i]
        kept += 1
    for i in range(kept):
        if tokens[i] >= SHARED:
            tokens[i] &= SHARED - 1
            values[i] = sums[tokens[i]]
            sums[tokens[i]] = 0.0
    return kept


@compiled
def _make_keys(indptr, genes, counts, token_of_gene, median_of_gene, token_bits, sums, tokens, values, medians, starts):
    """Turn ``values`` (float64 [z]) into sort keys, cell after cell; cell i's stand at ``starts[i]:starts[i + 1]``."""
    keys = values.view(np.uint64)
    low = (np.uint64(1) << np.uint64(token_bits)) - np.uint64(1)
    starts[0] = 0
    for cell in range(len(indptr) - 1):
        row, start = slice(indptr[cell], indptr[cell + 1]), starts[cell]
        token, key = tokens[start:], keys[start:]
        known = _known_values(
            genes[row], counts[row], token_of_gene, median_of_gene, sums, token, values[start:], medians
        )
        for i in range(known):  # the sign bit is always 0: shifted out, it leaves room for one more bit of value
            key[i] = (~(key[i] << np.uint64(1)) & ~low) | np.uint64(token[i])
        starts[cell + 1] = start + known


@compiled
def _order_run(keys, first, last, low, value_of):
    """Order ``keys[first:last]``, which agree in their leading bits, by full value; ties stay by token."""
    for i in range(first + 1, last):
        key = keys[i]
        value = value_of[key & low]
        j = i
        while j > first and value_of[keys[j - 1] & low] < value:
            keys[j] = keys[j - 1]
            j -= 1
        keys[j] = key


@compiled
def _settle_ties(
    indptr,
    genes,
    counts,
    token_of_gene,
    median_of_gene,
    token_bits,
    sums,
    tokens,
    values,
    medians,
    keys,
    starts,
    room,
    value_of,
):
    """Make the order of sorted keys exact in the first ``room`` places of each cell.

    ``tokens``, ``values`` and ``medians`` have room for the longest row; ``value_of`` is float64 [V].
    """
    low = (np.uint64(1) << np.uint64(token_bits)) - np.uint64(1)
    for cell in range(len(starts) - 1):
        end = starts[cell + 1]
        filled = False
        i = starts[cell]
        stop = min(end, i + room)
        while i < stop:
            j = i + 1
            while j < end and (keys[j] ^ keys[i]) <= low:
                j += 1
            if j - i > 1:
                if not filled:  # many cells have no such run: values are made a second time only here
                    row = slice(indptr[cell], indptr[cell + 1])
                    known = _known_values(
                        genes[row], counts[row], token_of_gene, median_of_gene, sums, tokens, values, medians
                    )
                    for k in range(known):
                        value_of[tokens[k]] = values[k]
                    filled = True
                _order_run(keys, i, j, low, value_of)
            i = j


@compiled
def _write_tokens(keys, starts, cu_lengths, prefix, suffix, pad, low, out):
    """Write each cell's prefix, ordered tokens and suffix at ``cu_lengths``; the rest of ``out`` becomes pad."""
    for cell in range(len(starts) - 1):
        at, end = cu_lengths[cell], cu_lengths[cell + 1]
        if at == end:
            continue
        for special in prefix:
            out[at] = special
            at += 1
        kept = end - at - len(suffix)
        key, token = keys[starts[cell] :], out[at:]
        for i in range(kept):
            token[i] = key[i] & low
        at += kept
        for special in suffix:
            out[at] = special
            at += 1
    for i in range(cu_lengths[-1], len(out)):
        out[i] = pad


@compiled
def _count_known(indptr, genes, counts, token_of_gene, seen, lengths):
    """Count the different known tokens of each row; ``seen`` (int64 [V]): last row that had a token, -1 at first."""
    for cell in range(len(indptr) - 1):
        known = 0
        for j in range(indptr[cell], indptr[cell + 1]):
            token = token_of_gene[genes[j]]
            if token >= SHARED and counts[j] > 0:
                token &= SHARED - 1
                known += seen[token] != cell
                seen[token] = cell
            else:
                known += (token >= 0) & (counts[j] > 0)
        lengths[cell] = known


class _Buffers(threading.local):
    """Working arrays that each thread keeps from one call to the next (fresh pages would cost more than the sort)."""

    def __init__(self) -> None:
        self.arrays: dict[str, np.ndarray] = {}

    def get(self, name: str, size: int, dtype: type, fill: float | None = None) -> np.ndarray:
        """Return ``size`` places; their content is left over, unless ``fill`` set it when they were made."""
        array = self.arrays.get(name)
        if array is None or len(array) < size:
            array = np.empty(size + size // 4, dtype)
            if fill is not None:
                array.fill(fill)
            self.arrays[name] = array
        return array[:size]


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
        self._token_of_gene = _flag_shared(self.tokens, vocabulary.size)
        median_of_token = np.ones(vocabulary.size)
        median_of_token[vocabulary.tokens] = vocabulary.medians
        self._median_of_gene = np.where(self.tokens >= 0, median_of_token[self.tokens], 1.0)
        self._token_bits = max(1, (vocabulary.size - 1).bit_length())
        self._prefix = np.array(vocabulary.prefix, np.int32)
        self._suffix = np.array(vocabulary.suffix, np.int32)
        self._buffers = _Buffers()

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_buffers": None}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state, _buffers=_Buffers())

    def known_genes(self, indptr: np.ndarray, genes: np.ndarray, counts: np.ndarray) -> np.ndarray:
        """Return how many different known genes each row has, int64 [n]; arguments as for `encode`."""
        lengths = np.empty(len(indptr) - 1, np.int64)
        seen = np.full(self.vocabulary.size, -1, np.int64)
        _count_known(indptr, genes, counts, self._token_of_gene, seen, lengths)
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
        get, size, width = self._buffers.get, len(counts), int(np.diff(indptr).max(initial=0))
        tokens, medians = get("tokens", size, np.int32), get("medians", width, np.float64)
        keys, starts = get("keys", size, np.uint64), np.empty(len(indptr), np.int64)
        sums, value_of = (
            get("sums", self.vocabulary.size, np.float64, 0.0),
            get("value_of", self.vocabulary.size, np.float64),
        )
        rows = (indptr, genes, counts, self._token_of_gene, self._median_of_gene, self._token_bits, sums, tokens)
        _make_keys(*rows, keys.view(np.float64), medians, starts)
        edges = starts.tolist()
        for first, last in pairwise(edges):  # numpy's own sort: vectorised, unlike one in a compiled loop
            keys[first:last].sort()
        room = self.max_length - self.around
        _settle_ties(*rows, get("row_values", width, np.float64), medians, keys, starts, room, value_of)
        cu_lengths = np.zeros(len(indptr), np.int64)
        np.cumsum(self.input_lengths(np.diff(starts)), out=cu_lengths[1:])
        out = np.empty(-(-int(cu_lengths[-1]) // multiple_of) * multiple_of, dtype)
        low = np.uint64((1 << self._token_bits) - 1)
        _write_tokens(keys, starts, cu_lengths, self._prefix, self._suffix, self.vocabulary.specials["pad"], low, out)
        return out, cu_lengths


def _flag_shared(tokens: np.ndarray, size: int) -> np.ndarray:
    """Set the `SHARED` flag where several genes have one token."""
    genes_of = np.bincount(tokens[tokens >= 0], minlength=size)
    return np.where((tokens >= 0) & (genes_of[tokens] > 1), tokens | SHARED, tokens).astype(np.int32)


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
