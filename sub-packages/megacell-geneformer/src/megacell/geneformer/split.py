# SPDX-License-Identifier: Apache-2.0
"""Which cells are held out for validation: whole donors where there are several, else whole sources, else cells."""

import hashlib
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from megacell.geneformer.compiling import compiled
from megacell.store import CellStore
from megacell.store.errors import DataError, UsageError

DONOR, SOURCE, CELL = "donor_id", "source", "cell"
LEVELS = (DONOR, SOURCE, CELL)  # tried in this order by "auto"


@dataclass(frozen=True)
class SplitSettings:
    """How cells are held out.

    Attributes
    ----------
    by : str, default "auto"
        "auto", "cell", "source" or any column of obs; all cells with the same value fall on the same side.
    holdout : float, default 0.1
        Share of the cells that is wanted for validation; 0 holds none out.
    seed : int, default 0
        Another seed holds out others.

    Raises
    ------
    UsageError
        A share outside 0 … 1, or a seed outside 0 … 2^64 - 1.
    """

    by: str = "auto"
    holdout: float = 0.1
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.holdout < 1:
            raise UsageError(f"split: holdout is {self.holdout}; give a share from 0 to below 1")
        if not 0 <= self.seed < 2**64:
            raise UsageError(f"split: seed is {self.seed}; give a whole number from 0 to 2^64 - 1")


@dataclass(frozen=True, eq=False)
class Split:
    """The two sides.

    Attributes
    ----------
    train, validation : np.ndarray, bool [cells]
        No cell is on both sides; a training cell that equals a validation cell is on neither.
    by : str
        The level that was taken: a column of obs, "source" or "cell".
    line : str
        For the log: which level, why, how many cells.
    """

    train: np.ndarray
    validation: np.ndarray
    by: str
    line: str


def split_cells(store: CellStore, settings: SplitSettings) -> Split:
    """Split a store's cells into training and validation.

    Groups (donors, sources) are taken in an order keyed by the seed until the wanted share is held out; one that would
    bring it above twice that share is passed over. A level serves when it has two groups or more and reaches half the
    wanted share. At the level of cells a cell's side is a function of the seed and of its own genes and counts: it
    stays when cells are appended to the store, and duplicates are on one side.

    Parameters
    ----------
    store : CellStore
        Whose cells.
    settings : SplitSettings
        By what, how many, which seed.

    Returns
    -------
    Split

    Raises
    ------
    UsageError
        ``settings.by`` is no column of obs.
    DataError
        The level that was asked for has one group only, or groups that are too large.
    """
    forced = settings.by != "auto"
    if forced and settings.by not in (SOURCE, CELL, *store.obs_columns):
        columns = ", ".join(store.obs_columns)
        raise UsageError(
            f"split: {store.path} has no column {settings.by!r} in obs; take auto, cell, source or one of {columns}"
        )
    passed_over: list[str] = []
    for level in (settings.by,) if forced else LEVELS:
        validation, verdict = _hold_out(store, level, settings)
        if validation is not None:
            break
        if forced:
            raise DataError(f"{store.path}: split by {level}: {verdict}; split by another column, or by cell")
        passed_over.append(f"not by {level}: {verdict}")
    assert validation is not None  # the level of cells always serves
    hashes = store.cell_hash
    train = ~validation
    if level != CELL:
        train &= ~np.isin(hashes, hashes[validation])
    dropped = len(validation) - int(train.sum()) - int(validation.sum())
    why = f" ({'; '.join(passed_over)})" if passed_over else ""
    line = f"split by {level}{why}: {verdict}; {train.sum():,} cells to train on, {validation.sum():,} held out"
    if dropped:
        line += f", {dropped:,} left out as duplicates of held-out ones"
    return Split(train, validation, level, line)


def _hold_out(store: CellStore, level: str, settings: SplitSettings) -> tuple[np.ndarray | None, str]:
    """Return the cells held out at one level, bool [cells], or None; and the verdict in words."""
    if settings.holdout == 0:
        return np.zeros(len(store), bool), "none held out, as asked for"
    if level == CELL:
        threshold = np.uint64(int(settings.holdout * 2**64))
        return _keyed(np.asarray(store.cell_hash), np.uint64(settings.seed)) < threshold, "by hash of genes and counts"
    if level not in (SOURCE, *store.obs_columns):
        return None, "no such column in obs"
    group, names = _groups(store, level)
    if len(names) < 2:
        return None, "one group only"
    cells = np.bincount(group, minlength=len(names))
    wanted = settings.holdout * len(group)
    taken = np.zeros(len(names), bool)
    for number in sorted(range(len(names)), key=lambda i: _order(names[i], settings.seed)):
        held = cells[taken].sum()
        if held >= wanted:
            break
        taken[number] = held + cells[number] <= 2 * wanted
    held = int(cells[taken].sum())
    if held < wanted / 2:
        return None, f"{len(names):,} groups too large for a share of {settings.holdout:g}"
    return taken[group], f"{taken.sum():,} of {len(names):,} groups held out"


def _groups(store: CellStore, level: str) -> tuple[np.ndarray, list[str]]:
    """Return each cell's group and the groups' names; cells without a value are grouped by their source."""
    sources = np.asarray(store.source_of)
    names = [source.name for source in store.sources]
    if level == SOURCE:
        codes, numbers = pd.factorize(sources)
        return codes, [f"source {names[i]}" for i in numbers]
    codes, values = pd.factorize(store.obs_column(level))
    labels = [f"value {value}" for value in values]
    missing = codes < 0
    if missing.any():
        more, numbers = pd.factorize(sources[missing])
        codes = codes.copy()
        codes[missing] = more + len(labels)
        labels += [f"source {names[i]}" for i in numbers]
    return codes, labels


def _order(name: str, seed: int) -> bytes:
    return hashlib.blake2b(name.encode(), key=seed.to_bytes(8, "little"), digest_size=16).digest()


@compiled
def _keyed(hashes: np.ndarray, seed: Any) -> np.ndarray:
    """Mix each hash with the seed (SplitMix64's finaliser), uint64 [n]."""
    mixed = np.empty(len(hashes), np.uint64)
    for i in range(len(hashes)):
        x = hashes[i] + (seed + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        mixed[i] = x ^ (x >> np.uint64(31))
    return mixed
