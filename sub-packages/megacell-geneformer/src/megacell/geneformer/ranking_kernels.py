# SPDX-License-Identifier: Apache-2.0
"""The compiled loops of rank value encoding; `megacell.geneformer.ranking` calls them and says what they are for.

What is handed around (n cells, z counts, G genes of the input, V token numbers, L longest row):

- rows: indptr int64 [n + 1], genes unsigned [z], counts [z];
- genes_to: float64 [G, 2], for each gene the median of its token, and as the bits of a uint64 what it is ranked as: its
  token, or `UNKNOWN`, or `SHARED` where others have the same token (side by side, they cost one cache line); its token,
  int32 [G], -1 for none; by token, the one gene of each that is not shared, int64 [V], and the median, float64 [V]; and
  the lowest bits of a key, set;
- room: keys uint64 [2 L], values and medians float64 [L], sums by token float64 [V], all zero before and after;
- specials: prefix int32, suffix int32, pad.

A key holds the value's leading bits, inverted, above the token in the lowest ``bits`` bits: smaller keys rank first.
What has no place in the ranking has a key of `UNKNOWN`'s kind, above all others, so that no loop needs a branch. Loops
that look up, divide and shift stand apart: the compiler vectorises the last two only so.
"""

from typing import Any

import numpy as np
from numpy import ndarray as Array

from megacell.geneformer.compiling import compiled
from megacell.geneformer.vector_sort import sort_keys

TARGET_SUM = 10_000.0  # Geneformer's normalisation
UNKNOWN = 2**64 - 1
SHARED = 2**64 - 2

Rows = tuple[Array, Array, Array]
GenesTo = tuple[Array, Array, Array, Array, Any]
Room = tuple[Array, Array, Array, Array]
Specials = tuple[Array, Array, int]


@compiled
def row_total(counts: Array) -> float:
    """Sum a row's counts in float64, in eight interleaved strands (exact, so order-free, for whole counts)."""
    a = b = c = d = e = f = g = h = 0.0
    stop = len(counts) // 8 * 8
    for j in range(0, stop, 8):
        a += counts[j]
        b += counts[j + 1]
        c += counts[j + 2]
        d += counts[j + 3]
        e += counts[j + 4]
        f += counts[j + 5]
        g += counts[j + 6]
        h += counts[j + 7]
    for j in range(stop, len(counts)):
        a += counts[j]
    return ((a + b) + (c + d)) + ((e + f) + (g + h))


@compiled
def _sum_shared(genes: Array, counts: Array, genes_to: GenesTo, sums: Array, tokens: Array) -> int:
    """Sum the counts of genes that share a token; write those tokens to ``tokens`` and return how many."""
    ranked_as, token_of_gene = genes_to[0].view(np.uint64), genes_to[1]
    found = 0
    for j in range(len(genes)):
        if ranked_as[genes[j], 1] == np.uint64(SHARED) and counts[j] > 0:
            token = token_of_gene[genes[j]]
            tokens[found] = token
            found += sums[token] == 0.0
            sums[token] += counts[j]
    return found


@compiled
def _value(count: Any, total: float, median: float) -> float:
    """The one definition of a value; other orders of these operations round differently."""
    return count / total * TARGET_SUM / median


@compiled
def _make_keys(genes: Array, counts: Array, total: float, genes_to: GenesTo, room: Room) -> tuple[int, int]:
    """Write a row's keys; return how many are written, and how many tokens of shared genes are the last of them."""
    of_gene, _, _, median_of_token, low = genes_to
    keys, values, medians, sums = room
    ranked_as, bits = of_gene.view(np.uint64), values.view(np.uint64)
    n = len(genes)
    for j in range(n):
        medians[j] = of_gene[genes[j], 0]
        keys[j] = ranked_as[genes[j], 1]
    for j in range(n):
        values[j] = _value(counts[j], total, medians[j])
    shared = 0
    for j in range(n):  # the sign bit is always 0: shifted out, it leaves room for one more bit of value
        shared += keys[j] == np.uint64(SHARED)
        keys[j] |= ~(bits[j] << np.uint64(1)) & ~low
    if shared == 0:
        return n, 0
    tokens = keys[n:].view(np.int64)
    found = _sum_shared(genes, counts, genes_to, sums, tokens)
    for i in range(found):
        token = tokens[i]
        values[i] = _value(sums[token], total, median_of_token[token])
        keys[n + i] = (~(bits[i] << np.uint64(1)) & ~low) | np.uint64(token)
    return n + found, found


@compiled
def _exact_value(token: Any, genes: Array, counts: Array, total: float, genes_to: GenesTo, sums: Array) -> float:
    """Compute the value of one of a row's tokens again."""
    count = sums[token]
    if count == 0.0:
        count = np.float64(counts[np.searchsorted(genes, genes_to[2][token])])
    return _value(count, total, genes_to[3][token])


@compiled
def _order_run(keys: Array, values: Array, low: Any) -> None:
    """Order keys that agree in their leading bits by their full values; ties stay by token."""
    for i in range(1, len(keys)):
        key, value = keys[i], values[i]
        j = i
        while j > 0 and (values[j - 1] < value or (values[j - 1] == value and keys[j - 1] & low > key & low)):
            keys[j], values[j] = keys[j - 1], values[j - 1]
            j -= 1
        keys[j], values[j] = key, value


@compiled
def _settle_ties(
    genes: Array, counts: Array, total: float, genes_to: GenesTo, room: Room, known: int, places: int
) -> None:
    """Make the order of a row's sorted keys exact in its first ``places``."""
    keys, values, _, sums = room
    low = genes_to[4]
    near = 0
    for i in range(min(known - 1, places)):
        near += (keys[i] ^ keys[i + 1]) <= low
    i = 0
    while near > 0 and i < min(known, places):
        j = i + 1
        while j < known and (keys[j] ^ keys[i]) <= low:
            j += 1
        if j - i > 1:
            for k in range(i, j):
                token = np.int64(keys[k] & low)
                values[k - i] = _exact_value(token, genes, counts, total, genes_to, sums)
            _order_run(keys[i:j], values[: j - i], low)
            near -= j - i - 1
        i = j


@compiled
def _rank_row(genes: Array, counts: Array, genes_to: GenesTo, room: Room, sort: int, places: int) -> int:
    """Write a row's ranked keys to the front of ``room``'s and return how many; exact in the first ``places``."""
    keys, sums, low = room[0], room[3], genes_to[4]
    total = row_total(counts)
    if not total > 0.0:
        return 0
    n, shared = _make_keys(genes, counts, total, genes_to, room)
    tokens = keys[n - shared : n] & low
    sort_keys(keys[:n], sort)
    known = n
    while known > 0 and keys[known - 1] >= ~low:  # unknown genes, and counts of zero that were stored
        known -= 1
    _settle_ties(genes, counts, total, genes_to, room, known, places)
    for token in tokens:
        sums[token] = 0.0
    return known


@compiled
def rank_rows(
    rows: Rows,
    genes_to: GenesTo,
    room: Room,
    sort: int,
    specials: Specials,
    max_length: int,
    cu_lengths: Array,
    out: Array,
) -> None:
    """Rank row after row: write prefix, ordered tokens and suffix to ``out``, and where each cell ends."""
    (indptr, genes, counts), (prefix, suffix, _) = rows, specials
    keys, low = room[0], genes_to[4]
    places = max_length - len(prefix) - len(suffix)
    at = 0
    cu_lengths[0] = 0
    for cell in range(len(indptr) - 1):
        row = slice(indptr[cell], indptr[cell + 1])
        kept = min(_rank_row(genes[row], counts[row], genes_to, room, sort, places), places)
        if kept > 0:
            for special in prefix:
                out[at] = special
                at += 1
            token = out[at : at + kept]
            for i in range(kept):
                token[i] = keys[i] & low
            at += kept
            for special in suffix:
                out[at] = special
                at += 1
        cu_lengths[cell + 1] = at


@compiled
def count_known(rows: Rows, token_of_gene: Array, is_shared: Array, seen: Array, lengths: Array) -> None:
    """Count the different known tokens of each row; ``seen`` (int64 [V]): last row that had a token, -1 at first."""
    indptr, genes, counts = rows
    for cell in range(len(indptr) - 1):
        known = 0
        for j in range(indptr[cell], indptr[cell + 1]):
            token = token_of_gene[genes[j]]
            if is_shared[genes[j]] and counts[j] > 0:
                known += seen[token] != cell
                seen[token] = cell
            else:
                known += (token >= 0) & (counts[j] > 0)
        lengths[cell] = known
