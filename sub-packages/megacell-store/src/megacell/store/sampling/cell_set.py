# SPDX-License-Identifier: Apache-2.0
"""Sets of cells as mapped bitmaps: a bit a cell, so that a choice among a billion takes 125 MB of page cache.

The i-th cell of a set is found through a directory of how many are in it up to each block of 512 (Jacobson 1989, rank
and select); nothing of the corpus' length is held in memory.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from megacell.core.cache import cache_directory, keep, mapped
from megacell.core.errors import DataError, UsageError
from megacell.core.jit import compiled
from megacell.store.read.query import matching
from megacell.store.read.reader import CellReader

BLOCK = 64  # bytes of the bitmap between two entries of the directory
CELLS_AT_ONCE = 1 << 22


class CellSet:
    """Cells of a store, ascending, by a bitmap; indexed like an array of their numbers.

    Parameters
    ----------
    bits : np.ndarray, uint8 [ceil(cells / 8)]
        Bit i % 8 of byte i // 8 says whether cell i is in; may be mapped.
    """

    def __init__(self, bits: np.ndarray) -> None:
        self.bits = bits
        counts = np.zeros(-(-len(bits) // BLOCK) + 1, np.int64)
        _count_blocks(bits, counts)
        self._before = np.cumsum(counts)

    @classmethod
    def of(cls, mask: np.ndarray) -> "CellSet":
        """Make a set of a mask, bool [cells]."""
        return cls(np.packbits(mask, bitorder="little"))

    def __len__(self) -> int:
        return int(self._before[-1])

    def __getitem__(self, which: np.ndarray | slice) -> np.ndarray:
        """Return the cells, int64, at the given places of the set (0 … len - 1)."""
        if isinstance(which, slice):
            which = np.arange(*which.indices(len(self)))
        places = np.asarray(which, np.int64)
        if len(places) and not 0 <= places.min() <= places.max() < len(self):
            raise IndexError(f"a place outside the {len(self)} cells of the set")
        cells = np.empty(len(places), np.int64)
        _select(self.bits, self._before, places, cells)
        return cells

    def __and__(self, other: "CellSet") -> "CellSet":
        """Return the cells that are in both sets of one store."""
        return CellSet(self.bits & other.bits)

    def having(self, lengths: np.ndarray) -> "CellSet":
        """Return the cells of the set whose length (integers [cells]) is above zero."""
        bits = np.empty_like(self.bits)
        for first in range(0, len(lengths), CELLS_AT_ONCE):
            part = slice(first // 8, -(-min(first + CELLS_AT_ONCE, len(lengths)) // 8))
            above = np.packbits(lengths[first : first + CELLS_AT_ONCE] > 0, bitorder="little")
            np.bitwise_and(self.bits[part], above, out=bits[part])
        return CellSet(bits)


@compiled
def _ones(byte: Any) -> Any:
    byte = byte - ((byte >> 1) & 0x55)
    byte = (byte & 0x33) + ((byte >> 2) & 0x33)
    return (byte + (byte >> 4)) & 0x0F


@compiled
def _count_blocks(bits: np.ndarray, counts: np.ndarray) -> None:
    for i in range(len(bits)):
        counts[i // BLOCK + 1] += _ones(np.int64(bits[i]))


@compiled
def _select(bits: np.ndarray, before: np.ndarray, places: np.ndarray, cells: np.ndarray) -> None:
    for i in range(len(places)):
        block = np.searchsorted(before, places[i], side="right") - 1
        left = places[i] - before[block]
        at = block * BLOCK
        while left >= _ones(np.int64(bits[at])):
            left -= _ones(np.int64(bits[at]))
            at += 1
        byte, bit = np.int64(bits[at]), 0
        while True:
            left -= (byte >> bit) & 1
            if left < 0:
                break
            bit += 1
        cells[i] = at * 8 + bit


def choose_cells(
    store: CellReader, where: str | None = None, exclude: Mapping[str, Sequence[Any]] | None = None
) -> CellSet:
    """Choose cells by their metadata.

    Worked out on the first call for a store's generation and a choice, then mapped from the cache.

    Parameters
    ----------
    store : CellReader
    where : str, optional
        A query that has to hold for a cell, as of `CellStore.select`: ``tissue == "lung" and age > 40``.
    exclude : mapping of column to values, optional
        A cell must have none of the values (compared as text) in any of these columns of obs, "source" among them. A
        cell without a value is not excluded.

    Raises
    ------
    UsageError
        No such column, a query that cannot be evaluated, or a value that no cell has: most likely misspelt.
    DataError
        No cell is left.
    """
    values = {str(column): sorted(map(str, chosen)) for column, chosen in (exclude or {}).items()}
    choice = json.dumps({"where": where, "exclude": values}, sort_keys=True)
    name = hashlib.sha256(choice.encode()).hexdigest()[:16]
    path = cache_directory() / "cells" / f"{store.digest}-{name}.npy"
    bits = mapped(path, np.dtype(np.uint8), -(-len(store) // 8))
    if bits is None:
        mask = np.ones(len(store), bool)
        if where is not None:
            mask &= matching(where, store.obs_columns, store.obs_slice, str(store.path))
        for column, excluded in values.items():
            mask &= ~_with(store, column, excluded)
        bits = keep(path, np.packbits(mask, bitorder="little"))
    cells = CellSet(bits)
    if not len(cells):
        raise DataError(f"{store.path}: no cell is left by {choice}; choose others")
    return cells


def column_of(store: CellReader, name: str) -> pd.Series:
    """Return a column of obs by the cells' numbers; UsageError names those there are."""
    if name not in store.obs_columns:
        raise UsageError(f"{store.path}: no obs column {name!r}; there are {', '.join(store.obs_columns)}")
    return store.obs_slice([name])[name]


def _with(store: CellReader, column: str, values: list[str]) -> np.ndarray:
    """Return which cells have one of the values, bool [cells]."""
    codes, present = pd.factorize(column_of(store, column))
    text = [str(value) for value in present]
    if missing := sorted(set(values) - set(text)):
        raise UsageError(f"{store.path}: no cell has {missing[0]!r} in obs column {column}; see `megacell info`")
    chosen: np.ndarray = np.append(np.isin(text, values), False)[codes]  # code -1, of what is missing, is the last
    return chosen
