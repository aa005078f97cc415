# SPDX-License-Identifier: Apache-2.0
"""The hot path of reading: rows of many mapped shards, copied into one CSR block or read in place."""

from typing import Any, NamedTuple

import numba
import numpy as np
from llvmlite import ir  # type: ignore[import-untyped]
from numba import types
from numba.extending import intrinsic

from megacell.core.jit import compiled

# One row of the shard table (int64): addresses of mapped arrays rather than the arrays themselves, because a
# compiled function cannot take a list of arrays of different types without being compiled for every mixture.
FIRST, CELLS, VALUES, INDPTR, INDICES, INDICES_KIND, COUNTS, COUNTS_KIND, POSITIONS, LARGE, OVERFLOWS = range(11)
FIELDS = 11
CACHE_LINE = 64
KINDS = {"uint8": 0, "uint16": 1, "uint32": 2, "float32": 3}


class RowsInPlace(NamedTuple):
    """Rows as they lie in mapped shards of uint16 gene numbers and uint8 counts, for compiled loops to read there.

    Valid while their store is; made by `CellStore.rows_in_place`.

    Attributes
    ----------
    indptr, shard, start, table
        As `locate` gives and takes them.
    longest : int
        Of the rows.
    """

    indptr: Any
    shard: Any
    start: Any
    table: Any
    longest: int


def _pointer(name: str, numba_type: Any) -> Any:
    """Make a compiled function that takes an address for a pointer to values of one type."""

    @intrinsic  # type: ignore[untyped-decorator]
    def cast(_context: Any, _address: Any) -> Any:
        signature = types.CPointer(numba_type)(types.int64)

        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            return builder.inttoptr(arguments[0], context.get_value_type(signature.return_type), name=name)

        return signature, generate

    return cast


_int64_at = _pointer("int64_at", types.int64)
_uint8_at = _pointer("uint8_at", types.uint8)
_uint16_at = _pointer("uint16_at", types.uint16)
_uint32_at = _pointer("uint32_at", types.uint32)
_float32_at = _pointer("float32_at", types.float32)


@intrinsic  # type: ignore[untyped-decorator]
def _prefetch_line(_context: Any, _address: Any) -> Any:
    """Ask for the cache line at an address, which need not exist."""

    def generate(context: Any, builder: Any, _: Any, arguments: Any) -> Any:
        pointer, number = ir.PointerType(ir.IntType(8)), ir.IntType(32)
        signature = ir.FunctionType(ir.VoidType(), [pointer, number, number, number])
        function = builder.module.declare_intrinsic("llvm.prefetch", [pointer], signature)
        for_reading, into_nearest, of_data = (ir.Constant(number, value) for value in (0, 3, 1))
        builder.call(function, [builder.inttoptr(arguments[0], pointer), for_reading, into_nearest, of_data])
        return context.get_dummy_value()

    return types.void(types.int64), generate


@compiled
def locate(cells: Any, first: Any, table: Any) -> tuple[Any, Any, Any, int]:
    """Find each cell's shard and values.

    Parameters
    ----------
    cells : int64 [n]
        Within the store.
    first : int64 [shards + 1]
        Number of each shard's first cell; the last is the number of cells.
    table : int64 [shards, FIELDS]
        Where each shard's arrays lie in memory.

    Returns
    -------
    indptr : int64 [n + 1]
        Of the block to be made.
    shard : int64 [n]
    start : int64 [n]
        Position of a cell's values within its shard.
    bad : int
        -1, or the shard whose own indptr leads outside its values.
    """
    n = len(cells)
    indptr = np.zeros(n + 1, np.int64)
    shard_of = np.empty(n, np.int64)
    start_of = np.empty(n, np.int64)
    for i in range(n):
        shard = np.searchsorted(first, cells[i], side="right") - 1
        pointers = numba.carray(_int64_at(table[shard, INDPTR]), table[shard, CELLS] + 1)
        row = cells[i] - first[shard]
        start, stop = pointers[row], pointers[row + 1]
        if start < 0 or stop < start or stop > table[shard, VALUES]:
            return indptr, shard_of, start_of, shard
        shard_of[i] = shard
        start_of[i] = start
        indptr[i + 1] = indptr[i] + stop - start
    return indptr, shard_of, start_of, -1


@compiled
def _copy_genes(source: Any, out: Any) -> int:
    """Copy a row's gene numbers and return the largest: scipy trusts what it is given, so we do not."""
    largest = source[0]
    for k in range(len(out)):
        out[k] = source[k]
        largest = max(largest, source[k])
    return int(largest)


@compiled
def _copy_counts(source: Any, out: Any) -> None:
    for k in range(len(out)):
        out[k] = source[k]


@compiled
def _copy_fractions(source: Any, out: Any) -> bool:
    """Copy a row's counts as they are; False if one is negative, infinite or no number, which no count is."""
    fine = True
    for k in range(len(out)):
        out[k] = source[k]
        fine &= (source[k] >= 0) & (source[k] < np.inf)
    return bool(fine)


@compiled
def _copy_narrow(source: Any, out: Any) -> int:
    """Copy a row's byte counts and return how many of them stand in the overflow arrays."""
    marks = np.uint32(0)
    for k in range(len(out)):
        out[k] = source[k]
        marks += np.uint32(source[k] == 255)
    return int(marks)


@compiled
def _put_large(table: Any, shard: int, start: int, out: Any) -> bool:
    """Put the counts above 254 of one row into place; False if one that the row marks is missing."""
    n = table[shard, OVERFLOWS]
    positions = numba.carray(_int64_at(table[shard, POSITIONS]), n)
    large = numba.carray(_uint32_at(table[shard, LARGE]), n)
    at = np.searchsorted(positions, start)
    for k in range(len(out)):
        if out[k] == 255:
            if at >= n or positions[at] != start + k:
                return False
            out[k] = large[at]
            at += 1
    return True


@compiled
def _prefetch_values(table: Any, shard: int, start: int, n: int) -> None:
    """Ask for n gene numbers and counts of a shard."""
    width = 1 << table[shard, INDICES_KIND]
    for byte in range(start * width, (start + n) * width, CACHE_LINE):
        _prefetch_line(table[shard, INDICES] + byte)
    width = 1 << min(table[shard, COUNTS_KIND], 2)
    for byte in range(start * width, (start + n) * width, CACHE_LINE):
        _prefetch_line(table[shard, COUNTS] + byte)


@compiled
def copy_rows(table: Any, indptr: Any, shard_of: Any, start_of: Any, n_genes: int, genes: Any, counts: Any) -> int:
    """Copy the rows that `locate` found.

    Parameters
    ----------
    table : int64 [shards, FIELDS]
        As for `locate`.
    indptr, shard_of, start_of : int64
        As `locate` returned them.
    n_genes : int
        A gene number from this on is an error.
    genes : int32 | uint16 | uint32 [nnz]
        Filled.
    counts : float32 [nnz]
        Filled.

    Returns
    -------
    int
        -1, or the shard in which a gene number is too large, an overflow value missing, or a count none.
    """
    for i in range(len(shard_of)):
        shard, start = shard_of[i], start_of[i]
        # slices, because their loops count from 0, which the compiler turns into vector instructions
        out_genes, out_counts = genes[indptr[i] : indptr[i + 1]], counts[indptr[i] : indptr[i + 1]]
        stop = start + len(out_genes)
        if start == stop:
            continue
        if i + 1 < len(shard_of):
            _prefetch_values(table, shard_of[i + 1], start_of[i + 1], indptr[i + 2] - indptr[i + 1])
        if table[shard, INDICES_KIND] == 1:
            largest = _copy_genes(numba.carray(_uint16_at(table[shard, INDICES]), stop)[start:], out_genes)
        else:
            largest = _copy_genes(numba.carray(_uint32_at(table[shard, INDICES]), stop)[start:], out_genes)
        if largest >= n_genes:
            return int(shard)
        kind = table[shard, COUNTS_KIND]
        if kind == 0:
            marks = _copy_narrow(numba.carray(_uint8_at(table[shard, COUNTS]), stop)[start:], out_counts)
            if marks and not _put_large(table, shard, start, out_counts):
                return int(shard)
        elif kind == 1:
            _copy_counts(numba.carray(_uint16_at(table[shard, COUNTS]), stop)[start:], out_counts)
        elif kind == 2:
            _copy_counts(numba.carray(_uint32_at(table[shard, COUNTS]), stop)[start:], out_counts)
        elif not _copy_fractions(numba.carray(_float32_at(table[shard, COUNTS]), stop)[start:], out_counts):
            return int(shard)
    return -1


@compiled
def row_in_place(rows: Any, i: int) -> tuple[Any, Any]:
    """Return a row's gene numbers, uint16 [n], and counts, uint8 [n], of which 255 says to ask `large_count`.

    Gene numbers are as the file has them: one that is too large is for the caller to find.
    """
    n, table, shard, start = rows.indptr[i + 1] - rows.indptr[i], rows.table, rows.shard[i], rows.start[i]
    genes = numba.carray(_uint16_at(table[shard, INDICES] + 2 * start), n)
    return genes, numba.carray(_uint8_at(table[shard, COUNTS] + start), n)


@compiled
def large_count(rows: Any, i: int, j: int) -> int:
    """Return count j of row i, which the row marks as above 254; -1 if it is missing."""
    table, shard, position = rows.table, rows.shard[i], rows.start[i] + j
    positions = numba.carray(_int64_at(table[shard, POSITIONS]), table[shard, OVERFLOWS])
    at = np.searchsorted(positions, position)
    if at >= len(positions) or positions[at] != position:
        return -1
    return int(numba.carray(_uint32_at(table[shard, LARGE]), len(positions))[at])


@compiled
def prefetch_row(rows: Any, i: int) -> None:
    """Have the processor read a row while something else is computed; any i will do."""
    if i < len(rows.shard):
        _prefetch_values(rows.table, rows.shard[i], rows.start[i], rows.indptr[i + 1] - rows.indptr[i])
