# SPDX-License-Identifier: Apache-2.0
"""A row ranked by the numbers of its pairs of gene and count: short keys, few values; compiled.

A key is 32 bits: the number of a pair (`megacell.geneformer.pair_numbers`) above the place of its count in the row.
"""

from typing import Any, NamedTuple

import numpy as np
from numpy import ndarray as Array

from megacell.core.jit import compiled
from megacell.core.vector_sort import sort_keys
from megacell.geneformer.tokens.pair_numbers import DAMAGED, NEAR, OTHER, PLACE_BITS, UNKNOWN, PairNumbers
from megacell.geneformer.tokens.ties import (
    IS_DAMAGED,
    NOT_RANKED,
    Genes,
    RowWorkspace,
    add_shared,
    clear_sums,
    count_near,
    settle_ties,
)
from megacell.geneformer.vocabulary.normalisation import exact_count, read_counts, value_of
from megacell.store.read.gather import RowsInPlace, prefetch_row, row_in_place

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
    others: Array, genes: Array, counts: Array, rows: RowsInPlace, cell: int, table: Genes, work: RowWorkspace
) -> int:
    """Give keys of `OTHER` pairs their numbers, shared tokens one key each; return how many there are then."""
    found, sums, n = work.found, work.sums, 0
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
    genes: Array, counts: Array, rows: RowsInPlace, cell: int, table: Genes, work: RowWorkspace, most: int, sort: int
) -> int:
    """Write a row's ranked short keys to the front of ``work``'s; return how many, `NOT_RANKED` or `IS_DAMAGED`."""
    keys, n, low = work.short, len(genes), np.uint32(SHORT_LOW)
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
        added = _number_others(others, genes, counts, rows, cell, table, work)
        if added < 0:
            return added
        sort_keys(others[:added], sort)
        _merge(keys, known, others[:added])
        known += added
    if count_near(keys[:known], low, most) > 0:
        total = read_counts(counts, rows, cell, work.counts)
        settle_ties(keys[:known], low, genes, total, table, work, most)
        known = IS_DAMAGED if total < 0 else known
    clear_sums(work.found[:added], genes, table, work.sums)
    return known


LONG_LOW = (1 << 20) - 1  # the bits of a key's place in its row


@compiled
def _make_long_keys(genes: Array, total: float, table: Genes, work: RowWorkspace) -> int:
    """Write a row's keys by value and return how many; the row's counts are in ``work``."""
    keys, values, bits, low, n = work.long, work.values, work.values.view(np.uint64), np.uint64(LONG_LOW), len(genes)
    for j in range(n):
        values[j] = table.medians[genes[j]]
    for j in range(n):
        values[j] = value_of(work.counts[j], total, values[j])
    for j in range(n):  # the sign bit is always 0: shifted out, it leaves room for one more bit of value
        keys[j] = (~(bits[j] << np.uint64(1)) & ~low) | np.uint64(j)
    if not table.any_shared:
        return n
    for j in range(len(genes)):
        if table.shared[genes[j]]:
            keys[j] = ~np.uint64(0)
            if work.counts[j] > 0 and add_shared(genes[j], work.counts[j], table, work.sums):
                work.found[n - len(genes)] = j
                n += 1
    for i in range(len(genes), n):
        j = work.found[i - len(genes)]
        values[i] = value_of(work.sums[table.tokens[genes[j]]], total, table.medians[genes[j]])
        keys[i] = (~(bits[i] << np.uint64(1)) & ~low) | np.uint64(j)
    return n


@compiled
def rank_by_values(
    genes: Array, counts: Array, rows: RowsInPlace, cell: int, table: Genes, work: RowWorkspace, most: int, sort: int
) -> int:
    """Write a row's ranked long keys to the front of ``work``'s; return how many, or `IS_DAMAGED`."""
    keys, low = work.long, np.uint64(LONG_LOW)
    total = read_counts(counts, rows, cell, work.counts)
    largest = 0
    for j in range(len(genes)):
        largest = max(largest, int(genes[j]))
    if total < 0 or largest >= len(table.tokens):
        return IS_DAMAGED
    if not total > 0:
        return 0
    known = _make_long_keys(genes, total, table, work)
    added = known - len(genes)
    sort_keys(keys[:known], sort)
    while known > 0 and keys[known - 1] >= ~low:  # genes without a token, and counts of zero that were stored
        known -= 1
    if count_near(keys[:known], low, most) > 0:
        settle_ties(keys[:known], low, genes, total, table, work, most)
    clear_sums(work.found[:added], genes, table, work.sums)
    return known


class Layout(NamedTuple):
    """How a cell is written.

    Attributes
    ----------
    prefix, suffix : int32
    most : int
        Genes of a cell.
    sort_short, sort_long : int
        `sort_address` of uint32 and uint64.
    """

    prefix: Any
    suffix: Any
    most: int
    sort_short: int
    sort_long: int


@compiled
def _write_cell(keys: Array, low: Any, genes: Array, tokens: Array, layout: Layout, out: Array) -> int:
    """Write prefix, ranked tokens and suffix; return how many."""
    if len(keys) == 0:
        return 0
    before, kept = len(layout.prefix), min(len(keys), layout.most)
    for i in range(before):
        out[i] = layout.prefix[i]
    for i in range(kept):
        out[before + i] = tokens[genes[keys[i] & low]]
    for i in range(len(layout.suffix)):
        out[before + kept + i] = layout.suffix[i]
    return before + kept + len(layout.suffix)


@compiled
def _encode_row(
    genes: Array,
    counts: Array,
    rows: RowsInPlace,
    cell: int,
    table: Genes,
    work: RowWorkspace,
    layout: Layout,
    out: Array,
) -> int:
    """Write a row's tokens; return how many, or `IS_DAMAGED`."""
    known = rank_by_numbers(genes, counts, rows, cell, table, work, layout.most, layout.sort_short)
    if known >= 0:
        return _write_cell(work.short[:known], np.uint32(SHORT_LOW), genes, table.tokens, layout, out)
    if known == NOT_RANKED:
        known = rank_by_values(genes, counts, rows, cell, table, work, layout.most, layout.sort_long)
    if known < 0:
        return known
    return _write_cell(work.long[:known], np.uint64(LONG_LOW), genes, table.tokens, layout, out)


@compiled
def rank_rows(
    indptr: Array,
    genes: Array,
    counts: Array,
    nowhere: RowsInPlace,
    table: Genes,
    work: RowWorkspace,
    layout: Layout,
    cu_lengths: Array,
    out: Array,
) -> int:
    """Rank row after row of copied counts into ``out``, and write where each cell ends; return a damaged row, or -1."""
    cu_lengths[0] = 0
    for cell in range(len(indptr) - 1):
        row, at = slice(indptr[cell], indptr[cell + 1]), cu_lengths[cell]
        written = _encode_row(genes[row], counts[row], nowhere, cell, table, work, layout, out[at:])
        if written < 0:
            return cell
        cu_lengths[cell + 1] = at + written
    return -1


@compiled
def rank_rows_in_place(
    rows: RowsInPlace, table: Genes, work: RowWorkspace, layout: Layout, cu_lengths: Array, out: Array
) -> int:
    """As `rank_rows`, of rows in mapped files: the next is read from memory while one is ranked."""
    cu_lengths[0] = 0
    prefetch_row(rows, 0)
    for cell in range(len(rows.shard)):
        prefetch_row(rows, cell + 1)
        genes, counts = row_in_place(rows, cell)
        at = cu_lengths[cell]
        written = _encode_row(genes, counts, rows, cell, table, work, layout, out[at:])
        if written < 0:
            return cell
        cu_lengths[cell + 1] = at + written
    return -1


@compiled
def count_known(indptr: Array, genes: Array, counts: Array, table: Genes, seen: Array, lengths: Array) -> None:
    """Count the different known tokens of each row; ``seen`` (int64 [V]): last row that had a token, -1 at first."""
    for cell in range(len(indptr) - 1):
        known = 0
        for j in range(indptr[cell], indptr[cell + 1]):
            token = table.tokens[genes[j]]
            if table.shared[genes[j]] and counts[j] > 0:
                known += seen[token] != cell
                seen[token] = cell
            else:
                known += (token >= 0) & (counts[j] > 0)
        lengths[cell] = known
