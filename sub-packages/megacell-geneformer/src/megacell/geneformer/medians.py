# SPDX-License-Identifier: Apache-2.0
"""Exact non-zero medians of every gene over any number of cells, in bounded memory; and the vocabulary made from them.

A median is selected, not sorted out of all values: each gene has an interval that holds its middle values. A sample of
the cells says where (Floyd and Rivest 1975); one pass over all cells counts what lies below and keeps what lies inside,
which proves the interval right, and the middle is read off. Where a sample misled, or the intervals hold more values
than fit, passes over the cells count values in bins and narrow the intervals to the bin of the middle ones until they
do. Positive float64 order like their bits, so intervals are of uint64 and bins are powers of two wide.

Shapes: G genes of the store, n cells.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np

from megacell.geneformer.buffers import WorkingRoom
from megacell.geneformer.compiling import compiled
from megacell.geneformer.gene_names import is_ensembl
from megacell.geneformer.row_counts import TARGET_SUM, row_total
from megacell.geneformer.split import SplitSettings, split_cells
from megacell.geneformer.vector_sort import sort_address, sort_keys
from megacell.geneformer.vocabulary import Vocabulary
from megacell.store import CellStore
from megacell.store.errors import DataError

CELLS_AT_ONCE = 256
MOST_VALUES = 1 << 25  # collected at once: 256 MiB
BINS = 256
LEAST_SAMPLE = 1024  # cells that say where medians lie
LARGEST_BITS = 0x7FF0000000000000  # infinity's: above those of every number
LOW, WIDTH, BELOW, SEEN = range(4)
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
def _bracket(sorted_values: np.ndarray) -> tuple[Any, Any]:
    """Return where the middle values of all cells lie, most likely, by those of a sample: lowest and highest bits."""
    m = len(sorted_values)
    spread = 2.5 * np.sqrt(m) + 2.0  # five standard deviations of the rank of a median
    first, last = int(0.5 * m - spread), int(0.5 * m + spread) + 1
    lowest = sorted_values[first] if first >= 0 else np.uint64(0)
    highest = sorted_values[last] if last < m else np.uint64(LARGEST_BITS)
    return lowest, highest


@compiled
def _brackets(values: np.ndarray, ends: np.ndarray, sort: int, state: np.ndarray) -> None:
    """Set every gene's interval in ``state`` from a sample's values, gene after gene; see `_survey`."""
    first = 0
    for g in range(len(ends)):
        own = values[first : ends[g]]
        sort_keys(own, sort)
        lowest, highest = _bracket(own)
        state[g, LOW], state[g, WIDTH] = lowest, highest - lowest + np.uint64(1)
        first = ends[g]


@compiled
def _survey(
    indptr: np.ndarray,
    genes: np.ndarray,
    counts: np.ndarray,
    bits: np.ndarray,
    state: np.ndarray,
    kept: tuple[np.ndarray, np.ndarray],
    at: Any,
) -> Any:
    """Count each gene's values and those below its interval, and keep those inside while there is room.

    ``state``: uint64 [G, 4], side by side for each gene what `LOW`, `WIDTH`, `BELOW` and `SEEN` number;
    ``kept``: genes uint32 and bits uint64, filled up to ``at``. Returns the new ``at``, which stops at their end.
    """
    kept_genes, kept_bits = kept
    end = len(kept_bits) - 1
    for cell in range(len(indptr) - 1):
        row = slice(indptr[cell], indptr[cell + 1])
        gene, count = genes[row], counts[row]
        _bits_of_row(count, bits)
        for j in range(len(gene)):
            g = np.uint64(gene[j])
            above_low = bits[j] - state[g, np.uint64(LOW)]  # far above every width for a value below
            there = np.uint64(count[j] > 0)
            state[g, np.uint64(SEEN)] += there
            state[g, np.uint64(BELOW)] += (above_low >> np.uint64(63)) & there
            kept_genes[at], kept_bits[at] = gene[j], bits[j]
            at = min(at + np.int64(np.uint64(above_low < state[g, np.uint64(WIDTH)]) & there), end)
    return at


@compiled
def _by_gene(genes: np.ndarray, bits: np.ndarray, ends: np.ndarray, out: np.ndarray) -> None:
    """Write values gene after gene; ``ends`` holds where each gene's begin, and then where they end."""
    for i in range(len(genes)):
        out[ends[genes[i]]] = bits[i]
        ends[genes[i]] += 1


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
def _find_inside(
    indptr: np.ndarray,
    genes: np.ndarray,
    counts: np.ndarray,
    bits: np.ndarray,
    low: np.ndarray,
    width: np.ndarray,
    places: np.ndarray,
    found: np.ndarray,
) -> Any:
    """Write the values inside the intervals and which of them (side x G + gene) each lies in; return how many."""
    at, n_genes = 0, low.shape[1]
    for cell in range(len(indptr) - 1):
        row = slice(indptr[cell], indptr[cell + 1])
        gene, count = genes[row], counts[row]
        _bits_of_row(count, bits)
        for j in range(len(gene)):
            g = gene[j]
            for side in range(2):
                above = bits[j] - low[side, g]  # a value below the interval wraps round to far above it
                if above < width[side, g] and count[j] > 0:
                    places[at], found[at] = side * n_genes + g, bits[j]
                    at += 1
    return at


class _Rows:
    """The cells' rows, block by block, as often as asked for; with working room for the longest."""

    def __init__(self, store: CellStore, cells: np.ndarray) -> None:
        self.store, self.cells, self._room = store, cells, WorkingRoom()

    def _empty(self, size: int, dtype: np.dtype) -> np.ndarray:
        return self._room.get(str(dtype), size, dtype)

    def __iter__(self) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]]:
        for first in range(0, len(self.cells), CELLS_AT_ONCE):
            block = self.cells[first : first + CELLS_AT_ONCE]
            indptr, genes, counts = self.store.gather(block, empty=self._empty)
            yield indptr, genes, counts, np.empty(int(np.diff(indptr).max(initial=0)), np.uint64)

    def inside(self, low: np.ndarray, width: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yield, block by block, the values inside the intervals: side x G + gene, int64, and bits, uint64."""
        for row in self:
            places, found = self._empty(2 * len(row[1]), np.dtype(np.int64)), np.empty(2 * len(row[1]), np.uint64)
            n = _find_inside(*row, low, width, places, found)
            yield places[:n], found[:n]


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
    state = np.zeros((n_genes, 4), np.uint64)
    _set_intervals(state, _Rows(store, _sample(store, rows.cells, most_values)))
    kept = np.empty(most_values + 1, np.uint32), np.empty(most_values + 1, np.uint64)
    medians, seen = _surveyed(rows, state, kept, min_cells)
    missed = (seen >= max(1, min_cells)) & np.isnan(medians)
    if missed.any() and seen[missed].sum() < most_values:  # a few genes, in whose values the sample misled
        state[:] = 0
        state[missed, WIDTH] = LARGEST_BITS
        medians = np.where(missed, _surveyed(rows, state, kept, min_cells)[0], medians)
    elif missed.any():
        del kept
        rank = np.stack([(seen - 1) // 2, seen // 2])
        medians = np.where(missed, _narrowed(rows, missed, seen, rank, most_values), medians)
    return medians, seen


def _surveyed(
    rows: "_Rows", state: np.ndarray, kept: tuple[np.ndarray, np.ndarray], min_cells: int
) -> tuple[np.ndarray, np.ndarray]:
    """Go through all rows; return the medians that lie in their genes' intervals, else NaN, and `SEEN`."""
    filled = 0
    for row in rows:
        filled = _survey(*row, state, kept, filled)
    seen, below = state[:, SEEN].astype(np.int64), state[:, BELOW].astype(np.int64)
    rank = np.stack([(seen - 1) // 2, seen // 2])
    inside = np.bincount(kept[0][:filled], minlength=len(state))
    found = (seen >= max(1, min_cells)) & (rank[0] >= below) & (rank[1] < below + inside)
    found &= filled < len(kept[0]) - 1  # else there was no room for all
    low, high = _selected(kept[0][:filled], kept[1][:filled], rank - below, found)
    return np.where(found, 0.5 * (low + high), np.nan), seen


def _narrowed(rows: "_Rows", wanted: np.ndarray, seen: np.ndarray, rank: np.ndarray, most_values: int) -> np.ndarray:
    """Compute the ``wanted`` genes' medians, float64 [G], in as many passes as it takes."""
    low = np.zeros((2, len(wanted)), np.uint64)
    width = np.where(wanted, np.uint64(LARGEST_BITS), np.uint64(0)) * np.ones((2, 1), np.uint64)
    inside = np.where(wanted, seen, 0) * np.ones((2, 1), np.int64)
    while inside[width > 1].sum() > most_values:
        bits = (
            np.ceil(np.log2(np.maximum(width, 1).astype(np.float64))).astype(np.int64) + 1
        )  # one to spare for rounding
        shift = np.maximum(bits - int(np.log2(BINS)), 0).astype(np.uint64)
        bins = np.zeros((2, len(wanted), BINS), np.uint32)
        for places, found in rows.inside(low, width):
            above = (found - low.ravel()[places]) >> shift.ravel()[places]
            np.add.at(bins.reshape(-1), places * BINS + above.astype(np.int64), 1)
        _narrow(low, width, shift, bins, rank, inside)
    return _middles(rows, low, width, rank, inside, wanted)


def _sample(store: CellStore, cells: np.ndarray, most_values: int) -> np.ndarray:
    """Return cells from all over, as many as are worth a look and fit."""
    few = cells[:: max(1, len(cells) // 64)]
    values = max(1, int(np.diff(store.gather(few)[0]).mean())) if len(few) else 1
    wanted = max(LEAST_SAMPLE, len(cells) // 16)
    return cells[:: max(1, len(cells) // max(1, min(wanted, most_values // (2 * values))))]


def _set_intervals(state: np.ndarray, rows: "_Rows") -> None:
    """Set each gene's interval by a sample's rows; see `_survey`."""
    state[:, WIDTH] = LARGEST_BITS
    stored = sum(int(row[0][-1]) for row in rows)
    kept, filled = (np.empty(stored + 1, np.uint32), np.empty(stored + 1, np.uint64)), 0
    for row in rows:
        filled = _survey(*row, state, kept, filled)
    inside = np.bincount(kept[0][:filled], minlength=len(state))
    ends = np.cumsum(inside) - inside
    values = np.empty(filled, np.uint64)
    _by_gene(kept[0][:filled], kept[1][:filled], ends, values)
    state[:, [BELOW, SEEN]] = 0
    _brackets(values, ends, sort_address(), state)


def _selected(places: np.ndarray, bits: np.ndarray, rank: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Return value number ``rank`` (from 0) of each place, float64 [..., places]; something where not ``wanted``."""
    if not len(bits):
        return np.zeros(rank.shape)
    inside = np.bincount(places, minlength=len(wanted))
    ends = np.cumsum(inside) - inside
    starts, values = ends.copy(), np.empty(len(bits), np.uint64)
    _by_gene(places, bits, ends, values)
    for first, last in zip(starts.tolist(), ends.tolist(), strict=True):
        values[first:last].sort()
    return values[np.where(wanted, starts + rank, 0)].view(np.float64)


def _middles(
    rows: _Rows, low: np.ndarray, width: np.ndarray, rank: np.ndarray, inside: np.ndarray, wanted: np.ndarray
) -> np.ndarray:
    """Collect what the intervals still hold and read the middle values off, float64 [G]."""
    still_open = width > 1  # an interval one value wide is that value
    room = int(inside[still_open].sum())
    places, bits, at = np.empty(room, np.int64), np.empty(room, np.uint64), 0
    if room:
        for block, found in rows.inside(low, np.where(still_open, width, np.uint64(0))):
            places[at : at + len(block)], bits[at : at + len(block)] = block, found
            at += len(block)
    chosen = _selected(places, bits, rank.ravel(), still_open.ravel()).reshape(low.shape)
    middle = np.where(still_open, chosen, low.view(np.float64))
    return np.where(wanted, 0.5 * (middle[0] + middle[1]), np.nan)


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
