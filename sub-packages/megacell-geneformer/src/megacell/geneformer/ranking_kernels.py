# SPDX-License-Identifier: Apache-2.0
"""The compiled loops of rank value encoding over rows; `megacell.geneformer.ranking` calls them and says what for.

A row is ranked by keys, smallest first: what orders it above, its place in the row in the lowest bits. n cells.
"""

from typing import Any, NamedTuple

import numpy as np
from numpy import ndarray as Array

from megacell.geneformer.compiling import compiled
from megacell.geneformer.exact_order import NOT_RANKED, Genes, Room
from megacell.geneformer.rank_by_numbers import SHORT_LOW, rank_by_numbers
from megacell.geneformer.rank_by_values import LONG_LOW, rank_by_values
from megacell.store.gather import RowsInPlace, prefetch_row, row_in_place


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
    genes: Array, counts: Array, rows: RowsInPlace, cell: int, table: Genes, room: Room, layout: Layout, out: Array
) -> int:
    """Write a row's tokens; return how many, or `IS_DAMAGED`."""
    known = rank_by_numbers(genes, counts, rows, cell, table, room, layout.most, layout.sort_short)
    if known >= 0:
        return _write_cell(room.short[:known], np.uint32(SHORT_LOW), genes, table.tokens, layout, out)
    if known == NOT_RANKED:
        known = rank_by_values(genes, counts, rows, cell, table, room, layout.most, layout.sort_long)
    if known < 0:
        return known
    return _write_cell(room.long[:known], np.uint64(LONG_LOW), genes, table.tokens, layout, out)


@compiled
def rank_rows(
    indptr: Array,
    genes: Array,
    counts: Array,
    nowhere: RowsInPlace,
    table: Genes,
    room: Room,
    layout: Layout,
    cu_lengths: Array,
    out: Array,
) -> int:
    """Rank row after row of copied counts into ``out``, and write where each cell ends; return a damaged row, or -1."""
    cu_lengths[0] = 0
    for cell in range(len(indptr) - 1):
        row, at = slice(indptr[cell], indptr[cell + 1]), cu_lengths[cell]
        written = _encode_row(genes[row], counts[row], nowhere, cell, table, room, layout, out[at:])
        if written < 0:
            return cell
        cu_lengths[cell + 1] = at + written
    return -1


@compiled
def rank_rows_in_place(
    rows: RowsInPlace, table: Genes, room: Room, layout: Layout, cu_lengths: Array, out: Array
) -> int:
    """As `rank_rows`, of rows in mapped files: the next is read from memory while one is ranked."""
    cu_lengths[0] = 0
    prefetch_row(rows, 0)
    for cell in range(len(rows.shard)):
        prefetch_row(rows, cell + 1)
        genes, counts = row_in_place(rows, cell)
        at = cu_lengths[cell]
        written = _encode_row(genes, counts, rows, cell, table, room, layout, out[at:])
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
