# SPDX-License-Identifier: Apache-2.0
"""The compiled passes of rank value encoding; `megacell.geneformer.ranking` calls them and says what they are for.

What is handed from pass to pass (n cells, z counts, G genes of the input, V token numbers):

- rows: indptr int64 [n + 1], genes unsigned [z], counts [z];
- genes_to: token of each gene, int32 [G], -1 for none, flagged where `SHARED`; median of that token, float64 [G]; bits
  that hold a token;
- room: sums of genes that share a token, float64 [V], all zero before and after; medians, float64 [longest row];
- specials: prefix int32, suffix int32, pad.

Loops go over slices from 0 on: an index that cannot be negative needs no check, and the compiler vectorises the loop.
"""

from typing import Any

import numpy as np
from numpy import ndarray as Array

from megacell.geneformer.compiling import compiled

TARGET_SUM = 10_000.0  # Geneformer's normalisation
SHARED = 1 << 30  # flag on a gene's token: other genes of the input have the same one

Rows = tuple[Array, Array, Array]
GenesTo = tuple[Array, Array, int]
Room = tuple[Array, Array]
Specials = tuple[Array, Array, int]


@compiled
def row_total(counts: Array) -> float:
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
def _sum_shared(tokens: Array, values: Array, medians: Array, known: int, sums: Array) -> int:
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
def _known_values(genes: Array, counts: Array, genes_to: GenesTo, room: Room, tokens: Array, values: Array) -> int:
    """Write tokens and values of one row's known genes, and return how many they are.

    Medians are collected apart from the arithmetic, which is vectorised then.
    """
    token_of_gene, median_of_gene, _ = genes_to
    sums, medians = room
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
def make_keys(rows: Rows, genes_to: GenesTo, room: Room, tokens: Array, keys: Array, starts: Array) -> None:
    """Write a sort key (uint64) for each known gene, cell after cell; cell i's stand at ``starts[i]:starts[i + 1]``.

    Smaller keys rank first: the leading bits of the value, inverted, above the token.
    """
    indptr, genes, counts = rows
    low = (np.uint64(1) << np.uint64(genes_to[2])) - np.uint64(1)
    values = keys.view(np.float64)
    starts[0] = 0
    for cell in range(len(indptr) - 1):
        row, start = slice(indptr[cell], indptr[cell + 1]), starts[cell]
        token, key = tokens[start:], keys[start:]
        known = _known_values(genes[row], counts[row], genes_to, room, token, values[start:])
        for i in range(known):  # the sign bit is always 0: shifted out, it leaves room for one more bit of value
            key[i] = (~(key[i] << np.uint64(1)) & ~low) | np.uint64(token[i])
        starts[cell + 1] = start + known


@compiled
def _order_run(keys: Array, low: Any, value_of: Array) -> None:
    """Order keys that agree in their leading bits by full value; ties stay by token."""
    for i in range(1, len(keys)):
        key = keys[i]
        value = value_of[key & low]
        j = i
        while j > 0 and value_of[keys[j - 1] & low] < value:
            keys[j] = keys[j - 1]
            j -= 1
        keys[j] = key


@compiled
def settle_ties(
    rows: Rows, genes_to: GenesTo, room: Room, tokens: Array, values: Room, keys: Array, starts: Array, places: int
) -> None:
    """Make the order of sorted keys exact in the first ``places`` of each cell.

    ``tokens`` holds the longest row; ``values``: float64 [longest row] and by token, float64 [V].
    """
    of_known, of_token = values
    indptr, genes, counts = rows
    low = (np.uint64(1) << np.uint64(genes_to[2])) - np.uint64(1)
    for cell in range(len(starts) - 1):
        key = keys[starts[cell] : starts[cell + 1]]
        filled = False
        i = 0
        while i < min(len(key), places):
            j = i + 1
            while j < len(key) and (key[j] ^ key[i]) <= low:
                j += 1
            if j - i > 1:
                if not filled:  # many cells have no such run: values are made a second time only here
                    row = slice(indptr[cell], indptr[cell + 1])
                    known = _known_values(genes[row], counts[row], genes_to, room, tokens, of_known)
                    for k in range(known):
                        of_token[tokens[k]] = of_known[k]
                    filled = True
                _order_run(key[i:j], low, of_token)
            i = j


@compiled
def write_tokens(
    keys: Array, starts: Array, cu_lengths: Array, specials: Specials, token_bits: int, out: Array
) -> None:
    """Write each cell's prefix, ordered tokens and suffix at ``cu_lengths``; the rest of ``out`` becomes pad."""
    prefix, suffix, pad = specials
    low = (np.uint64(1) << np.uint64(token_bits)) - np.uint64(1)
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
def count_known(rows: Rows, token_of_gene: Array, seen: Array, lengths: Array) -> None:
    """Count the different known tokens of each row; ``seen`` (int64 [V]): last row that had a token, -1 at first."""
    indptr, genes, counts = rows
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
