# SPDX-License-Identifier: Apache-2.0
"""The compiled loops of `megacell.geneformer.value_histograms`: values counted in buckets, histograms added and read.

A bucket is the upper bits of a positive float64: its exponent and the first `BITS` of its mantissa, so that 2^BITS
buckets share an octave (a factor of two) evenly. G genes, e occupied buckets.
"""

import numpy as np
from numpy import ndarray as Array

from megacell.core.jit import compiled

BITS = 8  # a median read off is within 2^-9 of itself, the fewest bits that keep it within 0.2 %
SHIFT = 52 - BITS
LOWEST = 1023 - 300  # exponent of the lowest octave: the least count of float32 over a total of 2^32 of the largest
OCTAVES = 314  # up to 2^14: a value is at most 10,000
DONE, FULL, DAMAGED = range(3)


@compiled
def split_rows(genes: Array, indptr: Array, firsts: Array, starts: Array) -> None:
    """Write where each cell's genes from ``firsts[r]`` on begin, int64 [ranges + 1, cells]; genes ascend in a cell."""
    for cell in range(len(indptr) - 1):
        row = genes[indptr[cell] : indptr[cell + 1]]
        for r in range(len(firsts)):
            starts[r, cell] = indptr[cell] + np.searchsorted(row, firsts[r])
        starts[len(firsts), cell] = indptr[cell + 1]


@compiled
def count_range(
    genes: Array, bits: Array, at: Array, ends: Array, first: int, pages: Array, counts: Array, used: Array
) -> int:
    """Count the values ``at`` … ``ends`` of each cell; those of a gene and octave on a page of their own.

    ``pages``: int32 [genes of the range, OCTAVES], 0 for none yet. ``counts``: uint32 [pages, 2^BITS]. ``used``: how
    many pages are, int64 [1]. Where they do not suffice, returns FULL, and goes on from there when called with more;
    DAMAGED at a value that no counts have, and at a gene of another range: genes do not ascend in its cell.
    """
    flat, found = counts.ravel(), np.empty(512, np.uint64)  # places are found before any is written to: none waits
    for cell in range(len(at)):
        j, state = at[cell], DONE
        while j < ends[cell] and state == DONE:
            n, stop = 0, min(ends[cell], j + len(found))
            while j < stop:
                value = bits[j]
                octave = (value >> np.uint64(52)) - np.uint64(LOWEST)  # wraps round for a value below, as for 0
                if octave < np.uint64(OCTAVES):
                    gene = np.uint64(genes[j]) - np.uint64(first)  # wraps round for a gene below
                    if gene >= np.uint64(len(pages)):
                        return DAMAGED
                    page = np.uint64(pages[gene, octave])
                    if page == 0:
                        if used[0] == len(counts):
                            state = FULL
                            break
                        page = np.uint64(used[0])
                        pages[gene, octave] = used[0]
                        used[0] += 1
                    found[n] = page << np.uint64(BITS) | (value >> np.uint64(SHIFT)) & np.uint64((1 << BITS) - 1)
                    n += 1
                elif value != 0:
                    return DAMAGED
                j += 1
            for i in range(n):
                flat[found[i]] += np.uint32(1)
        at[cell] = j
        if state != DONE:
            return FULL
    return DONE


@compiled
def count_occupied(pages: Array, counts: Array, occupied: Array) -> None:
    """Write how many buckets of each gene are occupied, int64 [genes of the range]."""
    for gene in range(len(pages)):
        for octave in range(OCTAVES):
            page = pages[gene, octave]
            if page:
                for i in range(1 << BITS):
                    occupied[gene] += counts[page, i] > 0


@compiled
def read_out(pages: Array, counts: Array, starts: Array, buckets: Array, cells: Array) -> None:
    """Write each gene's occupied buckets, ascending, and their counts from its place in ``starts`` on."""
    for gene in range(len(pages)):
        e = starts[gene]
        for octave in range(OCTAVES):
            page = pages[gene, octave]
            if page:
                for i in range(1 << BITS):
                    if counts[page, i] > 0:
                        buckets[e], cells[e] = (LOWEST + octave) << BITS | i, counts[page, i]
                        e += 1


@compiled
def add_sorted(keys: Array, cells: Array, more_keys: Array, more_cells: Array, out: Array, out_cells: Array) -> int:
    """Merge two ascending lists of keys into ``out``, adding up the counts of those in both; returns how many."""
    i = j = n = 0
    while i < len(keys) or j < len(more_keys):
        if j == len(more_keys) or (i < len(keys) and keys[i] < more_keys[j]):
            out[n], out_cells[n] = keys[i], cells[i]
            i += 1
        elif i == len(keys) or more_keys[j] < keys[i]:
            out[n], out_cells[n] = more_keys[j], more_cells[j]
            j += 1
        else:
            out[n], out_cells[n] = keys[i], cells[i] + more_cells[j]
            i, j = i + 1, j + 1
        n += 1
    return n


@compiled
def find_middle(bounds: Array, buckets: Array, cells: Array, least: int, middle: Array) -> None:
    """Write the buckets of each gene's two middle values, int64 [2, G], -1 for a gene in fewer than ``least`` cells."""
    for gene in range(len(bounds) - 1):
        start, stop = bounds[gene], bounds[gene + 1]
        total = cells[start:stop].sum()
        middle[:, gene] = -1
        seen = 0
        for e in range(start, stop if total >= least else start):
            for side in range(2):
                if seen <= (total - 1 + side) // 2 < seen + cells[e]:
                    middle[side, gene] = buckets[e]
            seen += cells[e]
