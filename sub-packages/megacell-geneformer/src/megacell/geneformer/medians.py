# SPDX-License-Identifier: Apache-2.0
"""Exact non-zero medians of every gene over any number of cells, in bounded memory; and the vocabulary made from them.

A median is selected, not sorted out of all values: each gene has an interval that holds its middle values. While the
intervals hold more values than fit, one pass over the cells counts them in bins and narrows every interval to the bin
of the middle ones; then one pass collects what is left, and the middle is read off. Positive float64 order like their
bits, so intervals are of uint64 and bins are powers of two wide.

Shapes: G genes of the store, n cells.
"""

from collections.abc import Iterator

import numpy as np

from megacell.geneformer.compiling import compiled
from megacell.geneformer.gene_names import is_ensembl
from megacell.geneformer.ranking_kernels import TARGET_SUM, row_total
from megacell.geneformer.split import SplitSettings, split_cells
from megacell.geneformer.vocabulary import Vocabulary
from megacell.store import CellStore
from megacell.store.errors import DataError

CELLS_AT_ONCE = 256
MOST_VALUES = 1 << 25  # collected at once: 256 MiB
BINS = 256
FIRST_GENE_TOKEN = 4
MAX_LENGTH = 2048
RANKED_BIOTYPES = ("protein_coding", "miRNA")  # Geneformer's choice, where biotypes are known


@compiled
def _bits_of_row(counts: np.ndarray, bits: np.ndarray) -> None:
    """Write the bits of each normalised value of a row to ``bits``, uint64."""
    total = row_total(counts)
    values = bits.view(np.float64)
    for j in range(len(counts)):
        values[j] = counts[j] / total * TARGET_SUM


@compiled
def _survey(
    indptr: np.ndarray,
    genes: np.ndarray,
    counts: np.ndarray,
    bits: np.ndarray,
    seen: np.ndarray,
    smallest: np.ndarray,
    largest: np.ndarray,
) -> None:
    """Count each gene's values and find the smallest and largest."""
    for cell in range(len(indptr) - 1):
        row = slice(indptr[cell], indptr[cell + 1])
        gene, count = genes[row], counts[row]
        _bits_of_row(count, bits)
        for j in range(len(gene)):
            if count[j] > 0:
                seen[gene[j]] += 1
                smallest[gene[j]] = min(smallest[gene[j]], bits[j])
                largest[gene[j]] = max(largest[gene[j]], bits[j])


@compiled
def _count_bins(
    indptr: np.ndarray,
    genes: np.ndarray,
    counts: np.ndarray,
    bits: np.ndarray,
    low: np.ndarray,
    width: np.ndarray,
    shift: np.ndarray,
    bins: np.ndarray,
) -> None:
    """Count the values in the lower and upper middle's intervals, in ``bins`` (uint32 [2, G, BINS]) 2^shift wide."""
    for cell in range(len(indptr) - 1):
        row = slice(indptr[cell], indptr[cell + 1])
        gene, count = genes[row], counts[row]
        _bits_of_row(count, bits)
        for j in range(len(gene)):
            g = gene[j]
            for side in range(2):
                above = bits[j] - low[side, g]  # a value below the interval wraps round to far above it
                if above < width[side, g] and count[j] > 0:
                    bins[side, g, above >> shift[side, g]] += 1


@compiled
def _narrow(
    low: np.ndarray, width: np.ndarray, shift: np.ndarray, bins: np.ndarray, rank: np.ndarray, inside: np.ndarray
) -> None:
    """Narrow each interval to the bin of the value that is number ``rank`` (from 0) in it."""
    for side in range(2):
        for g in range(low.shape[1]):
            if width[side, g] <= 1:
                continue
            b = 0
            while bins[side, g, b] <= rank[side, g]:
                rank[side, g] -= bins[side, g, b]
                b += 1
            inside[side, g] = bins[side, g, b]
            low[side, g] += np.uint64(b) << shift[side, g]
            width[side, g] = np.uint64(1) << shift[side, g]


@compiled
def _collect(
    indptr: np.ndarray,
    genes: np.ndarray,
    counts: np.ndarray,
    bits: np.ndarray,
    low: np.ndarray,
    width: np.ndarray,
    ends: np.ndarray,
    collected: np.ndarray,
) -> None:
    """Append the values inside the intervals to each interval's place in ``collected``."""
    for cell in range(len(indptr) - 1):
        row = slice(indptr[cell], indptr[cell + 1])
        gene, count = genes[row], counts[row]
        _bits_of_row(count, bits)
        for j in range(len(gene)):
            g = gene[j]
            for side in range(2):
                if bits[j] - low[side, g] < width[side, g] and count[j] > 0:
                    collected[ends[side, g]] = bits[j]
                    ends[side, g] += 1


class _Rows:
    """The cells' rows, block by block, as often as asked for; with working room for the longest."""

    def __init__(self, store: CellStore, cells: np.ndarray) -> None:
        self.store, self.cells = store, cells

    def __iter__(self) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]]:
        for first in range(0, len(self.cells), CELLS_AT_ONCE):
            indptr, genes, counts = self.store.gather(self.cells[first : first + CELLS_AT_ONCE])
            yield indptr, genes, counts, np.empty(int(np.diff(indptr).max(initial=0)), np.uint64)


def gene_medians(
    store: CellStore, cells: np.ndarray, min_cells: int = 1, most_values: int = MOST_VALUES
) -> tuple[np.ndarray, np.ndarray]:
    """Compute each gene's exact median of count / cell total x 10,000 over the cells that have it.

    Parameters
    ----------
    store : CellStore
        Whose genes.
    cells : int64 [n]
        Global cell numbers. The total is that of all counts of a cell in the store.
    min_cells : int, default 1
        Genes in fewer cells get no median.
    most_values : int
        Values held in memory at once, besides the bins (2 KiB a gene); fewer take more passes over the cells.

    Returns
    -------
    medians : np.ndarray, float64 [G]
        NaN without enough cells. The mean of the two middle values where the number of cells is even.
    seen : np.ndarray, int64 [G]
        In how many of the cells each gene has a count.
    """
    n_genes, rows = len(store.gene_ids), _Rows(store, np.asarray(cells, np.int64))
    seen = np.zeros(n_genes, np.int64)
    smallest, largest = np.full(n_genes, np.iinfo(np.uint64).max), np.zeros(n_genes, np.uint64)
    for row in rows:
        _survey(*row, seen, smallest, largest)
    wanted = seen >= max(1, min_cells)
    rank = np.stack([(seen - 1) // 2, seen // 2])
    low = np.stack([smallest, smallest])
    width = np.where(wanted, largest - smallest + np.uint64(1), np.uint64(0)) * np.ones((2, 1), np.uint64)
    inside = np.where(wanted, seen, 0) * np.ones((2, 1), np.int64)
    while inside[width > 1].sum() > most_values:
        bits = (
            np.ceil(np.log2(np.maximum(width, 1).astype(np.float64))).astype(np.int64) + 1
        )  # one to spare for rounding
        shift = np.maximum(bits - int(np.log2(BINS)), 0).astype(np.uint64)
        bins = np.zeros((2, n_genes, BINS), np.uint32)
        for row in rows:
            _count_bins(*row, low, width, shift, bins)
        _narrow(low, width, shift, bins, rank, inside)
    return _middles(rows, low, width, rank, inside, wanted), seen


def _middles(
    rows: _Rows, low: np.ndarray, width: np.ndarray, rank: np.ndarray, inside: np.ndarray, wanted: np.ndarray
) -> np.ndarray:
    """Collect what the intervals still hold and read the middle values off, float64 [G]."""
    open_width = np.where(width > 1, width, np.uint64(0))  # an interval one value wide is that value
    starts = np.concatenate([[0], np.cumsum(np.where(width > 1, inside, 0))])
    ends = starts[:-1].reshape(width.shape).copy()
    collected = np.empty(starts[-1], np.uint64)
    if starts[-1]:
        for row in rows:
            _collect(*row, low, open_width, ends, collected)
    middle = low.copy()
    _select(collected, starts, rank.ravel(), middle.reshape(-1))
    values = middle.view(np.float64)
    return np.where(wanted, 0.5 * (values[0] + values[1]), np.nan)


@compiled
def _select(collected: np.ndarray, starts: np.ndarray, rank: np.ndarray, middle: np.ndarray) -> None:
    for i in range(len(rank)):
        if starts[i + 1] > starts[i]:
            middle[i] = np.sort(collected[starts[i] : starts[i + 1]])[rank[i]]


def build_vocabulary(
    store: CellStore,
    split: SplitSettings | None = None,
    *,
    min_cells: int = 10,
    allow_subset: bool = False,
    name: str | None = None,
) -> tuple[Vocabulary, list[str]]:
    """Make a vocabulary from a store's training cells.

    Tokens: pad 0, mask 1, cls 2, eos 3, then the genes by ascending id. Cells whose source measured only a subset of
    genes are left out, as their totals, and so their medians, are of another kind.

    Parameters
    ----------
    store : CellStore
        Whose genes and cells.
    split : SplitSettings, optional
        How training cells are told from held-out ones.
    min_cells : int, default 10
        Genes in fewer training cells are left out.
    allow_subset : bool, default False
        Take cells from sources with a subset of genes as well.
    name : str, optional
        The store's by default.

    Returns
    -------
    vocabulary : Vocabulary
    lines : list of str
        What was done, for the log.

    Raises
    ------
    DataError
        No cell or no gene is left.
    """
    settings = split or SplitSettings()
    sides = split_cells(store, settings)
    lines = [sides.line]
    use = sides.train
    subsets = np.array([source.subset for source in store.sources], bool)
    if subsets.any():
        of_subset = subsets[np.asarray(store.source_of)]
        files = ", ".join(source.name for source in store.sources if source.subset)
        if not allow_subset:
            use = use & ~of_subset
        lines.append(f"{'taken' if allow_subset else 'left out'}: {of_subset.sum():,} cells of gene subsets ({files})")
    cells = np.flatnonzero(use)
    if not len(cells):
        raise DataError(
            f"{store.path}: no training cell is left to take medians from; convert more cells, or give --allow-subset"
        )
    medians, seen = gene_medians(store, cells, min_cells)
    kept = np.flatnonzero(~np.isnan(medians) & _ranked(store))
    if not len(kept):
        raise DataError(f"{store.path}: no gene is in {min_cells} of {len(cells):,} training cells; lower --min-cells")
    kept = kept[np.argsort(store.gene_ids[kept], kind="stable")]
    lines.append(
        f"{len(kept):,} genes of {len(seen):,}: those in at least {min_cells} of {len(cells):,} training cells"
    )
    if nameless := int((~is_ensembl(store.gene_ids[kept])).sum()):
        lines.append(f"{nameless:,} of them have a symbol for an id, no Ensembl id")
    vocabulary = Vocabulary(
        name=name or store.path.name,
        gene_ids=store.gene_ids[kept],
        symbols=store.symbols[kept],
        tokens=np.arange(FIRST_GENE_TOKEN, FIRST_GENE_TOKEN + len(kept), dtype=np.int32),
        medians=medians[kept],
        specials={"pad": 0, "mask": 1, "cls": 2, "eos": 3},
        prefix=(2,),
        suffix=(3,),
        max_length=MAX_LENGTH,
        provenance={
            "made": "built",
            "store": {"digest": store.digest, "generation": store.generation, "cells": len(store)},
            "split": {"by": settings.by, "holdout": settings.holdout, "seed": settings.seed},
            "split_by": sides.by,
            "training_cells": len(cells),
            "min_cells": min_cells,
            "allow_subset": allow_subset,
        },
    )
    return vocabulary, lines


def _ranked(store: CellStore) -> np.ndarray:
    """Return the genes that are protein-coding, miRNA or of no known biotype, bool [G]."""
    biotypes = np.asarray(store.biotypes, dtype=object)
    return np.isin(biotypes, ["", *RANKED_BIOTYPES])
