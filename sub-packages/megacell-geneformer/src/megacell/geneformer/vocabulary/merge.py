# SPDX-License-Identifier: Apache-2.0
"""Vocabularies made of histograms: of several vocabularies' cells together, and of a store's cells as it grows.

Of cells that were counted before nothing but their histograms is read: medians are within `MEDIAN_ERROR` of exact ones.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from megacell.core.errors import DataError, UsageError
from megacell.geneformer.vocabulary.build import MIN_CELLS, TrainingCells, lay_out, provenance
from megacell.geneformer.vocabulary.histogram_file import Counted, CountedStore, fingerprint
from megacell.geneformer.vocabulary.histograms import MEDIAN_ERROR, Histograms
from megacell.geneformer.vocabulary.vocabulary import Vocabulary
from megacell.store import CellStore
from megacell.store.sampling.split import SplitSettings

BOUND = f"medians are within {MEDIAN_ERROR:.2%} of the exact ones"
_OPTIONS = {"by": "--split-by", "holdout": "--holdout", "test": "--test", "seed": "--seed",
            "allow_subset": "--allow-subset"}  # fmt: skip


def merge_vocabularies(
    paths: Sequence[str | Path], *, min_cells: int = MIN_CELLS, name: str | None = None
) -> tuple[Vocabulary, Counted, list[str]]:
    """Make a vocabulary of the cells that several were made of; the order of the paths does not matter.

    Parameters
    ----------
    paths : sequence of str or Path
        Vocabularies with histograms.
    min_cells : int, default 10
        Genes in fewer training cells, of all together, are left out.
    name : str, optional
        The vocabularies' by default.

    Returns
    -------
    vocabulary : Vocabulary
    counted : Counted
        Its histograms.
    lines : list of str
        What was done, for the log.

    Raises
    ------
    UsageError
        Fewer than two vocabularies.
    DataError
        One without histograms, cells counted in two, other settings, or no gene is left.
    """
    if len(paths) < 2:
        raise UsageError("vocabulary merge: give two vocabularies or more")
    parts = []
    for path in paths:
        vocabulary = Vocabulary.open(path)
        parts.append((vocabulary, Counted.open(path, vocabulary), path))
    for (_, one, its_path), (_, other, other_path) in combinations(parts, 2):
        _refuse_unlike(one, its_path, other, other_path)
    parts.sort(key=lambda part: (part[0].name, part[0].hash))
    stores = [
        replace(store, vocabulary=store.vocabulary or vocabulary.hash)
        for vocabulary, counted, _ in parts
        for store in counted.stores
    ]
    first = parts[0][1]
    stores.sort(key=lambda store: (store.vocabulary, store.digest))
    histograms = Histograms.sum([counted.histograms for _, counted, _ in parts])
    merged = Counted(histograms, tuple(stores), first.split, first.allow_subset)
    own_name = name or "+".join(vocabulary.name for vocabulary, _, _ in parts)
    origin = {"vocabularies": sorted({store.vocabulary for store in stores})}
    vocabulary, lines = _laid_out("merged", merged, min_cells, own_name, origin, paths[0])
    cells = " + ".join(f"{sum(s.training_cells for s in counted.stores):,}" for _, counted, _ in parts)
    return vocabulary, merged, [f"{len(parts)} vocabularies, of {cells} training cells; {BOUND}", *lines]


def build_after(
    store: CellStore,
    before: str | Path,
    given: Mapping[str, Any],
    *,
    allow_subset: bool = False,
    min_cells: int | None = None,
    name: str | None = None,
    workers: int = 1,
) -> tuple[Vocabulary, Counted, list[str]]:
    """Make a vocabulary of all cells of a store that has grown, reading those that are new.

    Parameters
    ----------
    store : CellStore
    before : str or Path
        Vocabulary with histograms, made of the store when it had fewer cells.
    given : mapping
        What was asked of `SplitSettings`; it has to be as it was.
    allow_subset : bool, default False
        True has to be as it was.
    min_cells, name : optional
        As they were by default.
    workers : int, default 1
        Threads.

    Returns
    -------
    vocabulary, counted, lines
        As of `merge_vocabularies`.

    Raises
    ------
    UsageError
        Other settings.
    DataError
        Another store, nothing new in it, or the split of the cells counted before has changed.
    """
    old_vocabulary = Vocabulary.open(before)
    old = Counted.open(before, old_vocabulary)
    settings = SplitSettings(**old.split)
    for option, value in given.items():
        if value != (was := getattr(settings, option)):
            told = f"{_OPTIONS[option]} {value}: {before} was made with {was}"
            raise UsageError(f"{told}; leave the option out, or build anew without --after")
    if allow_subset and not old.allow_subset:
        raise UsageError(f"--allow-subset: {before} was made without; leave it out, or build anew without --after")
    record = _same_store(store, before, old)
    training = TrainingCells.of([store], settings, old.allow_subset)
    (cells,), (level,) = training.cells, training.levels
    known = int(np.searchsorted(cells, record.cells))
    if fingerprint(store.cell_hash[cells[:known]]) != record.training_fingerprint:
        raise DataError(
            f"{store.path}: with the cells appended, others of the earlier ones are trained on than in {before} (split "
            f"by {record.split_by}, now by {level}); build anew without --after, and with --split-by cell, which stays"
        )
    more = Histograms.count(store, cells[known:], workers)
    histograms = Histograms.sum([old.histograms, more])
    counted = Counted(histograms, (CountedStore.of(store, cells, level),), old.split, old.allow_subset)
    vocabulary, lines = _laid_out(
        "built after", counted, old_vocabulary.provenance["min_cells"] if min_cells is None else min_cells,
        name or old_vocabulary.name, {"after": old_vocabulary.hash}, store.path,
    )  # fmt: skip
    read = f"{len(cells) - known:,} training cells read, {known:,} as counted for {before}; {BOUND}"
    return vocabulary, counted, [*training.lines, read, *lines]


def _refuse_unlike(one: Counted, its_path: str | Path, other: Counted, other_path: str | Path) -> None:
    """Refuse to add up histograms of other settings, or of the same cells."""
    was, own = ({**asdict(SplitSettings(**c.split)), "allow_subset": c.allow_subset} for c in (one, other))
    for option, flag in _OPTIONS.items():
        if own[option] != was[option]:
            told = f"{other_path}: made with {flag} {own[option]}, but {its_path} with {was[option]}"
            raise DataError(f"{told}; build one of them again as the other")
    first, second = ({source for store in each.stores for source in store.sources} for each in (one, other))
    if both := len(first & second):
        files = "1 input file" if both == 1 else f"{both:,} input files"
        raise DataError(
            f"{other_path}: counts cells of {files} that {its_path} counts too; leave one of them out, or, of a store "
            "that has grown, take `vocabulary build --after`"
        )


def _same_store(store: CellStore, before: str | Path, old: Counted) -> CountedStore:
    """Return what was counted of a store when it had fewer cells."""
    if len(old.stores) > 1:
        raise DataError(f"{before}: of {len(old.stores)} stores; go on from the vocabulary of one, and merge that")
    (record,) = old.stores
    if len(store) < record.cells or fingerprint(store.cell_hash[: record.cells]) != record.fingerprint:
        raise DataError(
            f"{store.path}: does not begin with the {record.cells:,} cells that {before} was made of; give the store "
            "that was appended to, or build anew without --after"
        )
    if len(store) == record.cells:
        raise DataError(f"{store.path}: nothing was appended since {before} was made; go on using that")
    return record


def _laid_out(
    made: str, counted: Counted, min_cells: int, name: str, origin: dict[str, Any], place: str | Path
) -> tuple[Vocabulary, list[str]]:
    """Return the vocabulary of some histograms."""
    stores = counted.stores
    told = provenance(
        made, [store.name for store in stores], counted.split, [store.split_by for store in stores],
        sum(store.training_cells for store in stores), min_cells, counted.allow_subset,
    )  # fmt: skip
    medians = counted.histograms.medians(min_cells)
    return lay_out(name, counted.histograms.genes, medians, {**told, **origin, "median_error": MEDIAN_ERROR}, place)
