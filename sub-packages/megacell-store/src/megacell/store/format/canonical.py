# SPDX-License-Identifier: Apache-2.0
"""Compiled loops over rows: any file's rows become rows sorted by gene, without duplicates or zeros; their hashes."""

from typing import Any

import numpy as np

from megacell.core.jit import compiled

# What a value can be besides a positive whole number; rows() of a source report these as bits.
NOT_FINITE, NEGATIVE, FRACTIONAL, TOO_LARGE, BAD_COLUMN = 1, 2, 4, 8, 16
ODD = np.uint64(0x9E3779B97F4A7C15)  # 2^64 by the golden ratio
LARGEST = np.float64(2**32 - 1)  # the largest count that a shard can hold
# Position of the lowest set bit, by de Bruijn multiplication: numba offers no stable name for the instruction.
_DE_BRUIJN = np.uint64(0x03F79D71B4CB0A89)
_BIT = np.zeros(64, np.uint8)
_BIT[[((1 << i) * int(_DE_BRUIJN) & (2**64 - 1)) >> 58 for i in range(64)]] = np.arange(64)


@compiled
def mix(x: Any) -> Any:
    """Scatter the bits of a uint64 (docs/format.md, "Cell hash")."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


@compiled
def _copy_ascending(columns: Any, values: Any, gene_of: Any, genes: Any, out: Any) -> int:
    """Copy a row whose genes ascend already, as most files have them; return how many values, -1 if they do not."""
    n, last = 0, -1
    for k in range(len(columns)):
        column = columns[k]
        if column < 0 or column >= len(gene_of):
            return -1
        gene = gene_of[column]
        if gene < 0:
            continue
        if gene <= last:
            return -1
        last = gene
        genes[n] = gene
        out[n] = values[k]
        n += values[k] != 0
    return n


@compiled
def _scatter(columns: Any, values: Any, gene_of: Any, sums: Any, bits: Any, genes: Any, out: Any) -> tuple[int, bool]:
    """Sum a row's values by gene into a dense accumulator with one bit a gene, and gather it by walking the bits.

    Sorted without a sort. Returns how many values, and whether every column exists.
    """
    n, whole = 0, True
    for k in range(len(columns)):
        column = columns[k]
        if column < 0 or column >= len(gene_of):
            whole = False
            continue
        gene = gene_of[column]
        if gene >= 0:
            sums[gene] += values[k]
            bits[gene >> 6] |= np.uint64(1) << np.uint64(gene & 63)
    for word_number in range(len(bits)):
        word = bits[word_number]
        if word == 0:
            continue
        bits[word_number] = 0
        while word != 0:
            low = word & (~word + np.uint64(1))
            word ^= low
            gene = word_number * 64 + _BIT[(low * _DE_BRUIJN) >> np.uint64(58)]
            genes[n] = gene
            out[n] = sums[gene]
            n += sums[gene] != 0
            sums[gene] = 0.0
    return n, whole


@compiled
def _flags(values: Any) -> int:
    """Return what values are besides positive whole numbers."""
    fine = True
    for k in range(len(values)):
        value = np.float64(values[k])
        fine &= (value > 0) & (value <= LARGEST) & (value == np.floor(value))
    flags = 0
    if not fine:
        for k in range(len(values)):
            value = np.float64(values[k])
            if not np.isfinite(value):
                flags |= NOT_FINITE
            elif value < 0:
                flags |= NEGATIVE
            elif value != np.floor(value):
                flags |= FRACTIONAL
            elif value > LARGEST:
                flags |= TOO_LARGE
    return flags


@compiled
def canonical_rows(
    indptr: Any, columns: Any, values: Any, keep: Any, gene_of: Any, n_genes: int
) -> tuple[Any, Any, Any, int, int]:
    """Map a block's columns to genes; sum the values of equal genes; sort; drop zeros, columns and rows.

    Parameters
    ----------
    indptr : int64 [rows + 1]
        From 0.
    columns : int32 [nnz]
        In any order, repeats allowed.
    values : float32 | float64 [nnz]
        As they stand in the file.
    keep : bool [rows]
        False for a row to leave out.
    gene_of : int32 [columns]
        Gene number of a column, -1 for a column to drop.
    n_genes : int
        One more than the largest number in `gene_of`.

    Returns
    -------
    indptr : int64 [kept rows + 1]
    genes : uint32 [kept nnz]
    values : as given [kept nnz]
    flags : int
        OR of NOT_FINITE, NEGATIVE, FRACTIONAL, TOO_LARGE, BAD_COLUMN over the kept values.
    row : int
        The first row with any of them but FRACTIONAL (else the first with that), -1 if there is none.
    """
    sums = np.zeros(n_genes, np.float64)
    bits = np.zeros((n_genes + 63) // 64, np.uint64)
    out_indptr = np.zeros(keep.sum() + 1, np.int64)
    out_genes = np.empty(len(columns), np.uint32)
    out_values = np.empty(len(columns), values.dtype)
    begin, row_out, flags, bad_row = 0, 0, 0, -1
    for row in range(len(keep)):
        if not keep[row]:
            continue
        own, found = columns[indptr[row] : indptr[row + 1]], values[indptr[row] : indptr[row + 1]]
        row_flags = 0
        n = _copy_ascending(own, found, gene_of, out_genes[begin:], out_values[begin:])
        if n < 0:
            n, whole = _scatter(own, found, gene_of, sums, bits, out_genes[begin:], out_values[begin:])
            row_flags = 0 if whole else BAD_COLUMN
        row_flags |= _flags(out_values[begin : begin + n])
        if row_flags and (bad_row < 0 or (row_flags & ~FRACTIONAL and not flags & ~FRACTIONAL)):
            bad_row = row
        flags |= row_flags
        row_out += 1
        begin += n
        out_indptr[row_out] = begin
    return out_indptr, out_genes[:begin], out_values[:begin], flags, bad_row


@compiled
def cell_hashes(indptr: Any, genes: Any, values: Any, gene_hashes: Any) -> Any:
    """Hash each row's genes and counts, whatever the genes' numbers and order (docs/format.md, "Cell hash").

    Parameters
    ----------
    indptr : int64 [rows + 1]
        From 0.
    genes : uint32 [nnz]
        Numbers into `gene_hashes`.
    values : float32 | float64 [nnz]
        Rounded to float32 first if they are not whole: the hash is of what the store holds.
    gene_hashes : uint64 [genes]
        XXH3-64 of each gene id.

    Returns
    -------
    uint64 [rows]
        0 for a row without values.
    """
    hashes = np.zeros(len(indptr) - 1, np.uint64)
    bits = np.empty(1, np.float64)
    for row in range(len(hashes)):
        total = np.uint64(0)
        for k in range(indptr[row], indptr[row + 1]):
            bits[0] = values[k]
            if bits[0] != np.floor(bits[0]):
                bits[0] = np.float32(values[k])
            total += mix(gene_hashes[genes[k]] ^ (bits.view(np.uint64)[0] * ODD))
        hashes[row] = total
    return hashes


@compiled
def narrow(values: Any) -> tuple[Any, Any, Any]:
    """Squeeze whole counts into a byte each; where 255 stands, the overflow arrays hold the count.

    Returns
    -------
    counts : uint8 [nnz]
    positions : int64 [overflows]
    large : uint32 [overflows]
    """
    counts = np.empty(len(values), np.uint8)
    n = 0
    for k in range(len(values)):
        counts[k] = np.uint8(np.int32(min(values[k], 255)))
        n += values[k] >= 255
    positions = np.empty(n, np.int64)
    large = np.empty(n, np.uint32)
    n = 0
    for k in range(len(values) if len(positions) else 0):
        if counts[k] == 255:
            positions[n] = k
            large[n] = np.uint32(values[k])
            n += 1
    return counts, positions, large


def compile_all() -> None:
    """Compile the loops that write a shard, for the types that they meet, or load them from the cache."""
    empty, columns = np.zeros(1, np.int64), np.zeros(0, np.int32)
    for dtype in (np.float32, np.float64):
        values = np.zeros(0, dtype)
        canonical_rows(empty, columns, values, np.zeros(1, bool), columns, 0)
        cell_hashes(empty, np.zeros(0, np.uint32), values, np.zeros(0, np.uint64))
        narrow(values)
