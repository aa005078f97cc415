# SPDX-License-Identifier: Apache-2.0
"""Which cells are held out, for validation and for a test: whole donors where there are several, sources, or cells."""

import hashlib
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pandas as pd

from megacell.core.errors import DataError, UsageError
from megacell.core.jit import compiled
from megacell.store.read.reader import CellReader

DONOR, SOURCE, CELL = "donor_id", "source", "cell"
LEVELS = (DONOR, SOURCE, CELL)  # tried in this order by "auto"
TRAIN, VALIDATION, TEST = range(3)


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
    test : float, default 0
        Share of the cells that is wanted for a test, which neither training nor validation looks at. Taken from the
        cells to train on: those held out for validation are the same with a test and without.

    Raises
    ------
    UsageError
        A share outside 0 … 1, two that leave nothing, or a seed outside 0 … 2^64 - 1.
    """

    by: str = "auto"
    holdout: float = 0.1
    seed: int = 0
    test: float = 0.0

    def __post_init__(self) -> None:
        for name in ("holdout", "test"):
            if not 0 <= getattr(self, name) < 1:
                raise UsageError(f"split: {name} is {getattr(self, name)}; give a share from 0 to below 1")
        if not self.holdout + self.test < 1:
            raise UsageError(f"split: holdout {self.holdout} and test {self.test} leave nothing to train on; lower one")
        if not 0 <= self.seed < 2**64:
            raise UsageError(f"split: seed is {self.seed}; give a whole number from 0 to 2^64 - 1")

    def to_dict(self) -> dict[str, Any]:
        """Return the settings by name; without the test's share where there is none, which was not always there."""
        return {name: value for name, value in asdict(self).items() if name != "test" or value}


@dataclass(frozen=True, eq=False)
class Split:
    """The three sides.

    Attributes
    ----------
    train, validation, test : np.ndarray, bool [cells]
        No cell is on two sides. A training cell that equals one of validation or test is on none, nor is one of the
        test that equals one of validation.
    by : str
        The level that was taken: a column of obs, "source" or "cell".
    line : str
        For the log: which level, why, how many cells.
    """

    train: np.ndarray
    validation: np.ndarray
    test: np.ndarray
    by: str
    line: str


def split_cells(store: CellReader, settings: SplitSettings) -> Split:
    """Split a store's cells into those to train on, those for validation and those for a test.

    Groups (donors, sources) are taken in an order keyed by the seed until the share for validation is reached, and then
    on until that for the test is; one that would bring a side above twice its share is passed over. A level serves when
    it has two groups or more and each side reaches half its share. At the level of cells a cell's side is a function of
    the seed and of its own genes and counts: it stays when cells are appended to the store, and duplicates are on one
    side.

    Parameters
    ----------
    store : CellReader
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
        side, verdict = _sides(store, level, settings)
        if side is not None:
            break
        if forced:
            raise DataError(f"{store.path}: split by {level}: {verdict}; split by another column, or by cell")
        passed_over.append(f"not by {level}: {verdict}")
    assert side is not None  # the level of cells always serves
    train, validation, test = (side == each for each in (TRAIN, VALIDATION, TEST))
    if level != CELL:
        hashes = store.cell_hash
        train &= ~np.isin(hashes, hashes[~train])
        test &= ~np.isin(hashes, hashes[validation])
    why = f" ({'; '.join(passed_over)})" if passed_over else ""
    line = f"split by {level}{why}: {verdict}; {train.sum():,} cells to train on, {validation.sum():,} held out"
    if settings.test:
        line += f", {test.sum():,} kept for the test"
    if dropped := len(side) - int(train.sum() + validation.sum() + test.sum()):
        line += f", {dropped:,} left out as duplicates of held-out ones"
    return Split(train, validation, test, level, line)


def _sides(store: CellReader, level: str, settings: SplitSettings) -> tuple[np.ndarray | None, str]:
    """Return the side of each cell at one level, int8 [cells], or None; and the verdict in words."""
    if not settings.holdout + settings.test:
        return np.full(len(store), TRAIN, np.int8), "none held out, as asked for"
    if level == CELL:
        hashes = _keyed(np.asarray(store.cell_hash), np.uint64(settings.seed))
        sides = np.full(len(store), TRAIN, np.int8)
        sides[hashes < np.uint64(int((settings.holdout + settings.test) * 2**64))] = TEST
        sides[hashes < np.uint64(int(settings.holdout * 2**64))] = VALIDATION
        return sides, "by hash of genes and counts"
    if level not in (SOURCE, *store.obs_columns):
        return None, "no such column in obs"
    group, names = _groups(store, level)
    if len(names) < 2:
        return None, "one group only"
    cells = np.bincount(group, minlength=len(names))
    side = np.full(len(names), TRAIN, np.int8)
    in_turn = sorted(range(len(names)), key=lambda i: _order(names[i], settings.seed))
    for each, share in ((VALIDATION, settings.holdout), (TEST, settings.test)):
        wanted, held = share * len(group), 0
        for number in in_turn:
            if held < wanted and side[number] == TRAIN and held + cells[number] <= 2 * wanted:
                side[number] = each
                held += int(cells[number])
        if held < wanted / 2:
            return None, f"{len(names):,} groups too large for a share of {share:g}"
    verdict = f"{(side == VALIDATION).sum():,} of {len(names):,} groups held out"
    if settings.test:
        verdict += f", {(side == TEST).sum():,} kept for the test"
    return side[group], verdict


def _groups(store: CellReader, level: str) -> tuple[np.ndarray, list[str]]:
    """Return each cell's group and the groups' names; cells without a value are grouped by their source."""
    sources = np.asarray(store.source_of)
    names = [source.name for source in store.sources]
    if level == SOURCE:
        codes, numbers = pd.factorize(sources)
        return codes, [f"source {names[i]}" for i in numbers]
    codes, values = pd.factorize(store.obs_slice([level])[level])
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
