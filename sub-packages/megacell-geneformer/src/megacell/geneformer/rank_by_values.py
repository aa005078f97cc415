# SPDX-License-Identifier: Apache-2.0
"""A row ranked by its values, where numbers of pairs do not serve: fractional counts, very long rows; compiled.

A key is 64 bits: the value's leading bits, inverted, above the place of its count in the row.
"""

import numpy as np
from numpy import ndarray as Array

from megacell.geneformer.compiling import compiled
from megacell.geneformer.exact_order import IS_DAMAGED, Genes, Room, add_shared, clear_sums, count_near, settle_ties
from megacell.geneformer.row_counts import read_counts, value_of
from megacell.geneformer.vector_sort import sort_keys
from megacell.store.gather import RowsInPlace

LONG_LOW = (1 << 20) - 1  # the bits of a key's place in its row


@compiled
def _make_long_keys(genes: Array, total: float, table: Genes, room: Room) -> int:
    """Write a row's keys by value and return how many; the row's counts are in ``room``."""
    keys, values, bits, low, n = room.long, room.values, room.values.view(np.uint64), np.uint64(LONG_LOW), len(genes)
    for j in range(n):
        values[j] = table.medians[genes[j]]
    for j in range(n):
        values[j] = value_of(room.counts[j], total, values[j])
    for j in range(n):  # the sign bit is always 0: shifted out, it leaves room for one more bit of value
        keys[j] = (~(bits[j] << np.uint64(1)) & ~low) | np.uint64(j)
    if not table.any_shared:
        return n
    for j in range(len(genes)):
        if table.shared[genes[j]]:
            keys[j] = ~np.uint64(0)
            if room.counts[j] > 0 and add_shared(genes[j], room.counts[j], table, room.sums):
                room.found[n - len(genes)] = j
                n += 1
    for i in range(len(genes), n):
        j = room.found[i - len(genes)]
        values[i] = value_of(room.sums[table.tokens[genes[j]]], total, table.medians[genes[j]])
        keys[i] = (~(bits[i] << np.uint64(1)) & ~low) | np.uint64(j)
    return n


@compiled
def rank_by_values(
    genes: Array, counts: Array, rows: RowsInPlace, cell: int, table: Genes, room: Room, most: int, sort: int
) -> int:
    """Write a row's ranked long keys to the front of ``room``'s; return how many, or `IS_DAMAGED`."""
    keys, low = room.long, np.uint64(LONG_LOW)
    total = read_counts(counts, rows, cell, room.counts)
    largest = 0
    for j in range(len(genes)):
        largest = max(largest, int(genes[j]))
    if total < 0 or largest >= len(table.tokens):
        return IS_DAMAGED
    if not total > 0:
        return 0
    known = _make_long_keys(genes, total, table, room)
    added = known - len(genes)
    sort_keys(keys[:known], sort)
    while known > 0 and keys[known - 1] >= ~low:  # genes without a token, and counts of zero that were stored
        known -= 1
    if count_near(keys[:known], low, most) > 0:
        settle_ties(keys[:known], low, genes, total, table, room, most)
    clear_sums(room.found[:added], genes, table, room.sums)
    return known
