# SPDX-License-Identifier: Apache-2.0
"""The compiled loops of `megacell.geneformer.medians`: values of rows, and what lies in each gene's interval.

Positive float64 order like their bits, so values and intervals are uint64. G genes, z values.
"""

import numpy as np
from numpy import ndarray as Array

from megacell.core.jit import compiled
from megacell.core.vector_sort import sort_keys
from megacell.geneformer.vocabulary.normalisation import TARGET_SUM, row_total

ABOVE_ALL = 0x7FF0000000000000  # infinity's bits: above those of every number
BIN_BITS = 7
RANGE_BITS = 11  # 2,048 genes are a range: what is written for them stays within the processor's reach
LOW, WIDTH, COUNTED = range(3)  # columns of a search's state, uint64 [G, 4]: one half of a cache line a gene
_HALF, _SIGN = np.uint64(32), np.uint64(63)


@compiled
def values_of_rows(indptr: Array, counts: Array, bits: Array) -> int:
    """Write the bits of count / total x 10,000 of each row; 0 for counts of zero.

    Returns -1, or the row in which a count is negative, infinite or no number: no search for a median would end.
    """
    values = bits.view(np.float64)
    for cell in range(len(indptr) - 1):
        row = counts[indptr[cell] : indptr[cell + 1]]
        wrong = np.uint32(0)
        for j in range(len(row)):
            wrong |= np.uint32(not (row[j] >= 0 and row[j] < np.inf))
        if wrong:
            return cell
        total, value = row_total(row), values[indptr[cell] : indptr[cell + 1]]
        if total > 0:
            for j in range(len(row)):
                value[j] = row[j] / total * TARGET_SUM
        else:
            value[:] = 0.0
    return -1


@compiled
def count_seen(genes: Array, bits: Array, seen: Array) -> None:
    """Count each gene's values, uint32 [G]."""
    for j in range(len(genes)):
        seen[np.uint64(genes[j])] += np.uint32(bits[j] != 0)


@compiled
def collect(genes: Array, bits: Array, state: Array, streams: Array, kept: Array, kept_genes: Array) -> None:
    """Count the values below and inside each gene's interval, and keep those inside, genes of a range together.

    ``state``: `COUNTED` receives the values below in its upper half and those inside in its lower. ``streams``: int64
    [ranges, 2], where the next value of a range goes in ``kept``, and the last place it may go to, which is never read.
    ``kept_genes``: uint16, the gene's number within its range.
    """
    own, at, last = np.uint64(0), streams[0, 0], streams[0, 1]
    for j in range(len(genes)):
        g, value = np.uint64(genes[j]), bits[j]
        if g >> np.uint64(RANGE_BITS) != own:
            streams[own, 0] = at
            own = g >> np.uint64(RANGE_BITS)
            at, last = streams[own, 0], streams[own, 1]
        beyond = value - state[g, np.uint64(LOW)]  # wraps round for a value below
        there = np.uint64(value != 0)
        below, inside = (beyond >> _SIGN) & there, np.uint64(beyond < state[g, np.uint64(WIDTH)]) & there
        state[g, np.uint64(COUNTED)] += below << _HALF | inside
        kept[at], kept_genes[at] = value, g & np.uint64((1 << RANGE_BITS) - 1)
        at = min(at + np.int64(inside), last)
    streams[own, 0] = at


@compiled
def count_bins(genes: Array, bits: Array, state: Array, shift: Array, bins: Array) -> None:
    """Count the values below and inside each gene's interval, and those inside by bins 2^``shift`` wide."""
    for j in range(len(genes)):
        g, value = np.uint64(genes[j]), bits[j]
        beyond = value - state[g, np.uint64(LOW)]
        there = np.uint64(value != 0)
        below, inside = (beyond >> _SIGN) & there, (beyond < state[g, np.uint64(WIDTH)]) and value != 0
        state[g, np.uint64(COUNTED)] += below << _HALF | np.uint64(inside)
        if inside:
            bins[g, beyond >> np.uint64(shift[g])] += np.uint32(1)


@compiled
def by_gene(kept: Array, kept_genes: Array, ends: Array, out: Array) -> None:
    """Write a range's values gene after gene; ``ends`` holds where each gene's begin, and then where they end."""
    for i in range(len(kept)):
        g = np.uint64(kept_genes[i])
        out[ends[g]] = kept[i]
        ends[g] += 1


@compiled
def brackets(values: Array, ends: Array, sort: int, low: Array, width: Array, share: Array) -> None:
    """Set the intervals of some genes to where their middle values lie by those of a sample, most likely.

    ``values`` stand gene after gene; ``share`` receives how many of a gene's lie inside.
    """
    start = 0
    for g in range(len(ends)):
        own = values[start : ends[g]]
        m = len(own)
        sort_keys(own, sort)
        spread = 2.5 * np.sqrt(m) + 2.0  # five standard deviations of the rank of a median
        first, last = int(0.5 * m - spread), int(0.5 * m + spread) + 1
        lowest = own[first] if first >= 0 else np.uint64(0)
        highest = own[last] if last < m else np.uint64(ABOVE_ALL)
        low[g], width[g] = lowest, highest - lowest + np.uint64(1)
        share[g] = min(last, m - 1) - max(first, 0) + 1
        start = ends[g]


@compiled
def pick(values: Array, ends: Array, ranks: Array, wanted: Array, sort: int, found: Array) -> None:
    """Write value number ``ranks`` (from 0, int64 [2, G]) of each wanted gene to ``found``, uint64 [2, G].

    ``values`` stand gene after gene. A rank outside is left alone.
    """
    start = 0
    for g in range(len(ends)):
        own = values[start : ends[g]]
        if wanted[g]:
            sort_keys(own, sort)
            for side in range(2):
                if 0 <= ranks[side, g] < len(own):
                    found[side, g] = own[ranks[side, g]]
        start = ends[g]
