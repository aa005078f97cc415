# SPDX-License-Identifier: Apache-2.0
"""A row ranked by the numbers of its pairs of gene and count: short keys, few values; compiled.

A key is 32 bits: the number of a pair (`megacell.geneformer.pair_numbers`) above the place of its count in the row.
"""

import numpy as np
from numpy import ndarray as Array

from megacell.geneformer.compiling import compiled
from megacell.geneformer.exact_order import (
    IS_DAMAGED,
    NOT_RANKED,
    Genes,
    Room,
    add_shared,
    clear_sums,
    count_near,
    settle_ties,
)
from megacell.geneformer.pair_numbers import DAMAGED, NEAR, OTHER, PLACE_BITS, UNKNOWN, PairNumbers
from megacell.geneformer.row_counts import exact_count, read_counts
from megacell.geneformer.vector_sort import sort_keys
from megacell.store.gather import RowsInPlace

SHORT_LOW = (1 << PLACE_BITS) - 1  # the bits of a key's place in its row


@compiled
def _make_short_keys(genes: Array, counts: Array, pairs: PairNumbers, keys: Array) -> None:
    for j in range(len(genes)):
        begin = pairs.by_gene[np.uint64(genes[j])]
        count = np.uint32(min(counts[j], 255))
        count = count if count == counts[j] else np.uint32(255)
        at = (begin >> np.uint32(8)) + min(count, begin & np.uint32(255))
        keys[j] = pairs.keys[np.uint64(at)] | np.uint32(j)


@compiled
def _number_of(ratio: float, pairs: PairNumbers) -> int:
    """Return the number of a pair that has none of its own, -1 where it is near to several."""
    lowest, highest = pairs.lowest, pairs.highest
    first, last = 0, len(lowest)
    while first < last:  # the first whose lowest ratio is not clearly above
        middle = (first + last) // 2
        if lowest[middle] > ratio * (1 + 0.5 * NEAR):
            first = middle + 1
        else:
            last = middle
    if first == len(lowest) or highest[first] < ratio * (1 - 0.5 * NEAR):
        return 2 * first
    if first + 1 < len(lowest) and highest[first + 1] >= ratio * (1 - 0.5 * NEAR):
        return -1
    return 2 * first + 1


@compiled
def _number_others(
    others: Array, genes: Array, counts: Array, rows: RowsInPlace, cell: int, table: Genes, room: Room
) -> int:
    """Give keys of `OTHER` pairs their numbers, shared tokens one key each; return how many there are then."""
    found, sums, n = room.found, room.sums, 0
    for key in others:
        place = np.int64(key & np.uint32(SHORT_LOW))
        count = exact_count(counts, int(place), rows, cell)
        if count < 0:
            clear_sums(found[:n], genes, table, sums)
            return IS_DAMAGED
        if not table.shared[genes[place]] or add_shared(genes[place], count, table, sums):
            found[n] = place
            n += 1
    for i in range(n):
        gene = genes[found[i]]
        count = sums[table.tokens[gene]] if table.shared[gene] else exact_count(counts, found[i], rows, cell)
        number = _number_of(count / table.medians[gene], table.pairs) if 1.0 <= count < 2.0**53 else -1
        if number < 0:
            clear_sums(found[:n], genes, table, sums)
            return NOT_RANKED
        others[i] = np.uint32(number << PLACE_BITS | found[i])
    return n


@compiled
def _merge(keys: Array, known: int, others: Array) -> None:
    """Merge sorted ``others`` into the sorted first ``known`` of the keys, which have room for them."""
    i, at = known - 1, known + len(others) - 1
    for k in range(len(others) - 1, -1, -1):
        while i >= 0 and keys[i] > others[k]:
            keys[at] = keys[i]
            i -= 1
            at -= 1
        keys[at] = others[k]
        at -= 1


@compiled
def rank_by_numbers(
    genes: Array, counts: Array, rows: RowsInPlace, cell: int, table: Genes, room: Room, most: int, sort: int
) -> int:
    """Write a row's ranked short keys to the front of ``room``'s; return how many, `NOT_RANKED` or `IS_DAMAGED`."""
    keys, n, low = room.short, len(genes), np.uint32(SHORT_LOW)
    if n > 1 << PLACE_BITS or (counts.itemsize > 1 and n > 0 and counts[0] != np.floor(counts[0])):
        return NOT_RANKED
    _make_short_keys(genes, counts, table.pairs, keys)
    sort_keys(keys[:n], sort)
    if n > 0 and keys[n - 1] >> np.uint32(PLACE_BITS) == np.uint32(DAMAGED):
        return IS_DAMAGED
    while n > 0 and keys[n - 1] >> np.uint32(PLACE_BITS) == np.uint32(UNKNOWN):
        n -= 1
    known, added = n, 0
    while known > 0 and keys[known - 1] >> np.uint32(PLACE_BITS) == np.uint32(OTHER):
        known -= 1
    if n > known:
        if n - known > table.pairs.most_others:
            return NOT_RANKED
        others = keys[len(genes) : len(genes) + n - known]
        others[:] = keys[known:n]
        added = _number_others(others, genes, counts, rows, cell, table, room)
        if added < 0:
            return added
        sort_keys(others[:added], sort)
        _merge(keys, known, others[:added])
        known += added
    if count_near(keys[:known], low, most) > 0:
        total = read_counts(counts, rows, cell, room.counts)
        settle_ties(keys[:known], low, genes, total, table, room, most)
        known = IS_DAMAGED if total < 0 else known
    clear_sums(room.found[:added], genes, table, room.sums)
    return known
