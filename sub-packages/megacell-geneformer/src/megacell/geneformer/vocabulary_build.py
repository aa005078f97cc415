# SPDX-License-Identifier: Apache-2.0
"""A vocabulary made from the training cells of stores."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from megacell.geneformer.gene_names import is_ensembl
from megacell.geneformer.medians import CellsOf, medians_over
from megacell.geneformer.split import SplitSettings, split_cells
from megacell.geneformer.vocabulary import Vocabulary
from megacell.store import CellStore
from megacell.store.counts import LENGTH_NORMALISED
from megacell.store.errors import DataError

FIRST_GENE_TOKEN = 4
MAX_LENGTH = 2048
RANKED_BIOTYPES = ("protein_coding", "miRNA")  # Geneformer's choice, where biotypes are known


def build_vocabulary(
    stores: CellStore | Sequence[CellStore],
    split: SplitSettings | None = None,
    *,
    min_cells: int = 10,
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
    settings = split or SplitSettings()
    chosen, levels, lines = [], [], []
    for store in stores:
        cells, level, own = _training_cells(store, settings, allow_subset)
        chosen.append(cells)
        levels.append(level)
        lines += own if len(stores) == 1 else [f"{store.path}: {line}" for line in own]
    n_cells = sum(map(len, chosen))
    if not n_cells:
        paths = ", ".join(str(store.path) for store in stores)
        raise DataError(f"{paths}: no training cell is left to take medians from; convert more cells{_MEND}")
    genes = _Genes.of(stores)
    parts = [CellsOf(*each) for each in zip(stores, chosen, genes.numbers, strict=True)]
    medians, seen = medians_over(parts, len(genes.ids), min_cells, workers=workers)
    kept = np.flatnonzero(~np.isnan(medians) & np.isin(genes.biotypes, ["", *RANKED_BIOTYPES]))
    if not len(kept):
        raise DataError(f"{stores[0].path}: no gene is in {min_cells} of {n_cells:,} training cells; lower --min-cells")
    lines.append(f"{len(kept):,} genes of {len(seen):,}: those in at least {min_cells} of {n_cells:,} training cells")
    if nameless := int((~is_ensembl(genes.ids[kept])).sum()):
        lines.append(f"{nameless:,} of them have a symbol for an id, no Ensembl id")
    vocabulary = Vocabulary(
        name=name or "+".join(store.path.name for store in stores),
        gene_ids=genes.ids[kept],
        symbols=genes.symbols[kept],
        tokens=np.arange(FIRST_GENE_TOKEN, FIRST_GENE_TOKEN + len(kept), dtype=np.int32),
        medians=medians[kept],
        specials={"pad": 0, "mask": 1, "cls": 2, "eos": 3},
        prefix=(2,),
        suffix=(3,),
        max_length=MAX_LENGTH,
        provenance=_provenance(stores, settings, levels, n_cells, min_cells, allow_subset),
    )
    return vocabulary, lines


_MEND = ", or give --allow-subset"


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


class _Genes:
    """The genes of several stores under one numbering, by ascending id; symbols and biotypes of the first that has one.

    Attributes
    ----------
    ids, symbols, biotypes : object str [G]
    numbers : list of int64 array
        Of each store's genes.
    """

    def __init__(self, ids: np.ndarray, numbers: list[np.ndarray], stores: Sequence[CellStore]) -> None:
        self.ids, self.numbers = ids, numbers
        self.symbols, self.biotypes = np.full(len(ids), "", object), np.full(len(ids), "", object)
        for store, own in reversed(list(zip(stores, numbers, strict=True))):
            for names, theirs in ((self.symbols, store.symbols), (self.biotypes, store.biotypes)):
                given = np.asarray(theirs, object)
                names[own[given != ""]] = given[given != ""]

    @classmethod
    def of(cls, stores: Sequence[CellStore]) -> "_Genes":
        """Number all genes of the stores."""
        ids, numbers = np.unique(np.concatenate([store.gene_ids for store in stores]), return_inverse=True)
        ends = np.cumsum([len(store.gene_ids) for store in stores])
        return cls(ids, np.split(numbers, ends[:-1]), stores)


def _provenance(
    stores: Sequence[CellStore], settings: SplitSettings, levels: list[str], cells: int, min_cells: int, subset: bool
) -> dict[str, Any]:
    """Return what the vocabulary was made from."""
    made_of = [{"digest": s.digest, "generation": s.generation, "cells": len(s)} for s in stores]
    return {
        "made": "built",
        **({"store": made_of[0]} if len(stores) == 1 else {"stores": made_of}),
        "split": settings.to_dict(),
        "split_by": levels[0] if len(set(levels)) == 1 else ", ".join(levels),
        "training_cells": cells,
        "min_cells": min_cells,
        "allow_subset": subset,
    }
