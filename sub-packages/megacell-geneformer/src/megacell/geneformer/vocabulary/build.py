# SPDX-License-Identifier: Apache-2.0
"""A vocabulary made from the training cells of stores."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megacell.core.errors import DataError, UsageError
from megacell.geneformer.vocabulary.gene_names import Genes, is_ensembl
from megacell.geneformer.vocabulary.medians import CellsOf, medians_over
from megacell.geneformer.vocabulary.vocabulary import Vocabulary
from megacell.store import CellStore
from megacell.store.sampling.split import SplitSettings, split_cells
from megacell.store.sources.count_kinds import LENGTH_NORMALISED

FIRST_GENE_TOKEN = 4
MAX_LENGTH = 2048
MIN_CELLS = 10  # genes in fewer training cells are left out
RANKED_BIOTYPES = ("protein_coding", "miRNA")  # Geneformer's choice, where biotypes are known


def build_vocabulary(
    stores: CellStore | Sequence[CellStore],
    split: SplitSettings | None = None,
    *,
    min_cells: int = MIN_CELLS,
    allow_subset: bool = False,
    name: str | None = None,
    workers: int = 1,
) -> tuple[Vocabulary, list[str]]:
    """Make a vocabulary from the training cells of a store, or of several.

    Tokens: pad 0, mask 1, cls 2, eos 3, then the genes by ascending id. Cells whose source measured only a subset of
    genes are left out, as their totals, and so their medians, are of another kind; so are length-normalised ones. Of
    several stores a gene's median is that over all their cells: medians of medians would be another number.

    Parameters
    ----------
    stores : CellStore or sequence of CellStore
        Whose genes and cells.
    split : SplitSettings, optional
        How training cells are told from held-out ones, in each store.
    min_cells : int, default 10
        Genes in fewer training cells are left out.
    allow_subset : bool, default False
        Take cells from sources with a subset of genes as well.
    name : str, optional
        The stores' by default.
    workers : int, default 1
        Threads.

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
    stores = [stores] if isinstance(stores, CellStore) or not isinstance(stores, Sequence) else list(stores)
    training = TrainingCells.of(stores, split or SplitSettings(), allow_subset)
    return build_exactly(training, min_cells, name, workers)


@dataclass(frozen=True, eq=False)
class TrainingCells:
    """The cells of some stores that medians are taken from.

    Attributes
    ----------
    stores : list of CellStore
    settings : SplitSettings
    allow_subset : bool
    cells : list of int64 array
        Of each store, ascending.
    levels : list of str
        By what each store was split.
    lines : list of str
        What is to tell of it.
    """

    stores: list[CellStore]
    settings: SplitSettings
    allow_subset: bool
    cells: list[np.ndarray]
    levels: list[str]
    lines: list[str]

    @classmethod
    def of(cls, stores: list[CellStore], settings: SplitSettings, allow_subset: bool) -> "TrainingCells":
        """Choose them; UsageError if a store is given twice, DataError if there is no cell."""
        chosen, levels, lines = [], [], []
        for i, store in enumerate(stores):
            if twin := next((other for other in stores[:i] if other.digest == store.digest), None):
                raise UsageError(f"{store.path}: the same store as {twin.path}; give each once")
            cells, level, own = _training_cells(store, settings, allow_subset)
            chosen.append(cells)
            levels.append(level)
            lines += own if len(stores) == 1 else [f"{store.path}: {line}" for line in own]
        if not sum(map(len, chosen)):
            paths = ", ".join(str(store.path) for store in stores)
            raise DataError(
                f"{paths}: no training cell is left to take medians from; convert more cells, or give --allow-subset"
            )
        return cls(stores, settings, allow_subset, chosen, levels, lines)


def build_exactly(
    training: TrainingCells, min_cells: int = MIN_CELLS, name: str | None = None, workers: int = 1
) -> tuple[Vocabulary, list[str]]:
    """Make a vocabulary with exact medians, as `build_vocabulary` does, of cells that are chosen already."""
    stores = training.stores
    genes, numbers = Genes.union([Genes(store.gene_ids, store.symbols, store.biotypes) for store in stores])
    parts = [CellsOf(*each) for each in zip(stores, training.cells, numbers, strict=True)]
    medians, _ = medians_over(parts, len(genes.ids), min_cells, workers=workers)
    made_of = [{"digest": s.digest, "generation": s.generation, "cells": len(s)} for s in stores]
    made = provenance(
        "built", made_of, training.settings.to_dict(), training.levels, sum(map(len, training.cells)), min_cells,
        training.allow_subset,
    )  # fmt: skip
    vocabulary, lines = lay_out(name or "+".join(s.path.name for s in stores), genes, medians, made, stores[0].path)
    return vocabulary, training.lines + lines


def lay_out(
    name: str, genes: Genes, medians: np.ndarray, made: dict[str, Any], place: str | Path
) -> tuple[Vocabulary, list[str]]:
    """Give tokens to the genes that have a median and are of a kind that is ranked.

    Parameters
    ----------
    name : str
    genes : Genes
        By ascending id.
    medians : float64 [G]
        NaN for a gene in too few cells.
    made : dict
        From `provenance`.
    place : str or Path
        Where genes and cells are from, for the message.

    Raises
    ------
    DataError
        No gene is left.
    """
    kept = np.flatnonzero(~np.isnan(medians) & np.isin(genes.biotypes, ["", *RANKED_BIOTYPES]))
    cells, min_cells = made["training_cells"], made["min_cells"]
    if not len(kept):
        raise DataError(f"{place}: no gene is in {min_cells} of {cells:,} training cells; lower --min-cells")
    lines = [f"{len(kept):,} genes of {len(medians):,}: those in at least {min_cells} of {cells:,} training cells"]
    if nameless := int((~is_ensembl(genes.ids[kept])).sum()):
        lines.append(f"{nameless:,} of them have a symbol for an id, no Ensembl id")
    vocabulary = Vocabulary(
        name=name,
        gene_ids=genes.ids[kept],
        symbols=genes.symbols[kept],
        tokens=np.arange(FIRST_GENE_TOKEN, FIRST_GENE_TOKEN + len(kept), dtype=np.int32),
        medians=medians[kept],
        specials={"pad": 0, "mask": 1, "cls": 2, "eos": 3},
        prefix=(2,),
        suffix=(3,),
        max_length=MAX_LENGTH,
        provenance=made,
    )
    return vocabulary, lines


def provenance(
    made: str, stores: list[dict[str, Any]], split: Mapping[str, Any], levels: Sequence[str], cells: int,
    min_cells: int, allow_subset: bool,
) -> dict[str, Any]:  # fmt: skip
    """Return what a vocabulary was made from: digest, generation and cells of each store, and how."""
    return {
        "made": made,
        **({"store": stores[0]} if len(stores) == 1 else {"stores": stores}),
        "split": dict(split),
        "split_by": levels[0] if len(set(levels)) == 1 else ", ".join(levels),
        "training_cells": cells,
        "min_cells": min_cells,
        "allow_subset": allow_subset,
    }


def _training_cells(store: CellStore, settings: SplitSettings, allow_subset: bool) -> tuple[np.ndarray, str, list[str]]:
    """Return the cells that medians are taken from, by what they were split, and what to tell of it."""
    sides = split_cells(store, settings)
    lines, use = [sides.line], sides.train
    source_of = np.asarray(store.source_of)
    subset = np.array([source.subset for source in store.sources], bool)
    normalised = np.array([source.kind == LENGTH_NORMALISED for source in store.sources], bool)
    for what, of_kind, taken in (
        ("gene subsets", subset & ~normalised, allow_subset),
        ("length-normalised values", normalised, False),
    ):
        if of_kind.any():
            cells = of_kind[source_of]
            files = ", ".join(source.name for source, is_it in zip(store.sources, of_kind, strict=True) if is_it)
            use = use if taken else use & ~cells
            lines.append(f"{'taken' if taken else 'left out'}: {cells.sum():,} cells of {what} ({files})")
    return np.flatnonzero(use), sides.by, lines
