# SPDX-License-Identifier: Apache-2.0
"""What is ranked, where, and how keys that are alike are put in order by the exact values; compiled.

n cells, z counts, G genes of the input, V token numbers, L longest row.
"""

from typing import Any, NamedTuple

import numpy as np
from numpy import ndarray as Array

from megacell.core.jit import compiled
from megacell.geneformer.tokens.pair_numbers import PairNumbers
from megacell.geneformer.vocabulary.normalisation import value_of

NOT_RANKED, IS_DAMAGED = -1, -2


class Genes(NamedTuple):
    """What is known of the input's genes.

    Attributes
    ----------
    tokens : int32 [G]
        -1 for none.
    medians : float64 [G]
        Infinite without a token, which makes a value of 0.
    shared : bool [G]
        Others have the same token: their counts are added up first.
    any_shared : bool
    pairs : PairNumbers
    """

    tokens: Any
    medians: Any
    shared: Any
    any_shared: bool
    pairs: PairNumbers


class RowWorkspace(NamedTuple):
    """Arrays to work on a row in.

    Attributes
    ----------
    short : uint32 [L]
    long : uint64 [2 L]
    counts, values : float64 [2 L]
    found, tied : int64 [2 L]
    sums : float64 [V]
        By token; all zero before and after.
    """

    short: Any
    long: Any
    counts: Any
    values: Any
    found: Any
    tied: Any
    sums: Any


@compiled
def count_near(keys: Array, low: Any, most: int) -> int:
    """Return how many of the first ``most`` keys are like the next in all but the place."""
    near = np.uint32(0)  # 32 bits, as the keys: twice as many to a vector
    for i in range(min(len(keys) - 1, most)):
        near = np.uint32(near + np.uint32((keys[i] ^ keys[i + 1]) <= low))
    return int(near)


@compiled
def add_shared(gene: Any, count: float, table: Genes, sums: Array) -> bool:
    """Add a count to its token's sum; return if it is the first."""
    token = table.tokens[gene]
    first: bool = sums[token] == 0.0
    sums[token] += count
    return first


@compiled
def clear_sums(places: Array, genes: Array, table: Genes, sums: Array) -> None:
    for place in places:
        sums[table.tokens[genes[place]]] = 0.0


@compiled
def _order_run(keys: Array, values: Array, tokens: Array) -> None:
    """Order keys by value, descending, then by token, ascending (Shell's sort)."""
    gap = len(keys)
    while gap > 1:
        gap = 1 if gap < 5 else gap * 5 // 11
        for i in range(gap, len(keys)):
            key, value, token = keys[i], values[i], tokens[i]
            j = i
            while j >= gap and (values[j - gap] < value or (values[j - gap] == value and tokens[j - gap] > token)):
                keys[j], values[j], tokens[j] = keys[j - gap], values[j - gap], tokens[j - gap]
                j -= gap
            keys[j], values[j], tokens[j] = key, value, token


@compiled
def settle_ties(keys: Array, low: Any, genes: Array, total: float, table: Genes, work: RowWorkspace, most: int) -> None:
    """Make the order of sorted keys exact in the first ``most``; the row's counts are in ``work``."""
    i = 0
    while i < min(len(keys), most):
        j = i + 1
        while j < len(keys) and (keys[j] ^ keys[i]) <= low:
            j += 1
        if j - i > 1:
            tokens = work.tied[: j - i]
            for k in range(i, j):
                place = np.int64(keys[k] & low)
                gene = genes[place]
                tokens[k - i] = table.tokens[gene]
                count = work.sums[table.tokens[gene]] if table.shared[gene] else work.counts[place]
                work.values[k - i] = value_of(count, total, table.medians[gene])
            _order_run(keys[i:j], work.values[: j - i], tokens)
        i = j
