# SPDX-License-Identifier: Apache-2.0
"""A row's counts as the compiled loops read them, and the one definition of a value.

A row's counts are bytes where they lie in a store's files (`megacell.store.gather.RowsInPlace`), floats elsewhere.
"""

from typing import Any

from numpy import ndarray as Array

from megacell.core.jit import compiled
from megacell.store.read.gather import RowsInPlace, large_count

TARGET_SUM = 10_000.0  # Geneformer's normalisation


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
def value_of(count: Any, total: float, median: float) -> float:
    """The one definition of a value; other orders of these operations round differently."""
    return count / total * TARGET_SUM / median


@compiled
def exact_count(counts: Array, j: int, rows: RowsInPlace, cell: int) -> float:
    """Return count j of a row; of bytes, 255 stands for a larger one. Negative for one that is missing."""
    if counts.itemsize == 1 and counts[j] == 255:
        return float(large_count(rows, cell, j))
    return float(counts[j])


@compiled
def read_counts(counts: Array, rows: RowsInPlace, cell: int, out: Array) -> float:
    """Write a row's counts to ``out``, float64, and return their total; negative if one is missing."""
    for j in range(len(counts)):
        out[j] = counts[j]
    if counts.itemsize == 1:
        large = 0
        for j in range(len(counts)):
            large += counts[j] == 255
        j = 0
        while large > 0:
            if counts[j] == 255:
                out[j] = exact_count(counts, j, rows, cell)
                large -= 1
                if out[j] < 0:
                    return -1.0
            j += 1
    return row_total(out[: len(counts)])
