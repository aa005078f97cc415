# SPDX-License-Identifier: Apache-2.0
"""Which cells of one store another holds too: what a model was trained on, in what it is tested on."""

from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path

import numpy as np

from megacell.core.errors import DataError
from megacell.store.format.manifest import NAME
from megacell.store.read.cell_store import CellStore
from megacell.store.read.duplicates import EMPTY, held

STORE_OF = "megacell.store_of"  # entry-point group: functions from a path (of a model, say) to its open store, or None


@dataclass(frozen=True)
class Overlap:
    """Of the `cells` with counts of one source, `held` stand in the other store."""

    source: str
    cells: int
    held: int


def overlap(store: CellStore, other: CellStore) -> list[Overlap]:
    """Return, by source of a store, how many of its cells another holds: equal gene ids with equal counts."""
    wanted, source_of = np.asarray(store.cell_hash), np.asarray(store.source_of)
    found = held(wanted, other.path, other.manifest)
    n = len(store.sources)
    cells = np.bincount(source_of[wanted != EMPTY], minlength=n)
    hits = np.bincount(source_of[found], minlength=n)
    return [Overlap(s.name, int(cells[i]), int(hits[i])) for i, s in enumerate(store.sources)]


def open_store_of(path: Path) -> CellStore:
    """Open a store, or the store that something of another package (a model) says that it was made from.

    Raises
    ------
    DataError
        Neither.
    """
    if not (path / NAME).exists():
        for point in entry_points(group=STORE_OF):
            found = point.load()(path)
            if found is not None:
                store: CellStore = found
                return store
        if path.exists() and not path.is_dir():
            raise DataError(f"{path}: neither a cell store nor a model that names its store; give the store's folder")
    return CellStore.open(path)
