# SPDX-License-Identifier: Apache-2.0
"""Graphs between cells on their way into a store: set aside shard by shard, then written with store-wide numbers.

A shard's cells are known before those of the others, so its edges are kept by row of their file until all shards are
made and each cell has its number (`graph_joining`).
"""

from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from megacell.core.errors import DataError
from megacell.core.files import TEMPORARY, move_into_place, remove_tree
from megacell.store.format.blocks import ROWS
from megacell.store.format.manifest import GraphRecord
from megacell.store.format.shard import ArrayWriter, map_array

Array = np.ndarray[Any, Any]
FOLDER = "neighbours"
INDPTR, INDICES, WEIGHTS = "indptr.npy", "indices.npy", "weights.npy"
_TYPES = {INDPTR: ("int64",), INDICES: ("uint32", "uint64"), WEIGHTS: ("float32", "float64")}


def widest_weights(types: Iterable[str]) -> str:
    """Return the type that holds the weights of several graphs; "" is of one that is not there."""
    return "float64" if "float64" in types else "float32"


def map_graph(store: Path, name: str, record: GraphRecord) -> tuple[Array, Array, Array]:
    """Map indptr, cells and weights of the graph that a manifest calls so.

    Raises
    ------
    DataError
        An array that is missing, or not as the manifest says.
    """
    folder = store / FOLDER / name
    arrays = (map_array(folder / file, record.files.get(file), types) for file, types in _TYPES.items())
    indptr, cells, weights = arrays
    if len(indptr) != record.cells + 1 or len(cells) != len(weights):
        raise DataError(f"{folder}: arrays of different lengths; run `megacell verify {store}`")
    return indptr, cells, weights


class GraphWriter:
    """Writes one graph of a store; `finish` puts it in its place.

    Parameters
    ----------
    store : Path
    name : str
        The folder's name under ``neighbours/``; one that no manifest names.
    cells : int
        Of the store.
    weights : str
        Their type.
    """

    def __init__(self, store: Path, name: str, cells: int, weights: str) -> None:
        self._place = store / FOLDER / name
        self._folder = self._place.with_name(name + TEMPORARY)
        for left in (self._place, self._folder):  # of a process that was killed
            remove_tree(store, f"{FOLDER}/{left.name}")
        self._folder.mkdir(parents=True)
        dtypes = {INDPTR: "int64", INDICES: "uint32" if cells <= 1 << 32 else "uint64", WEIGHTS: weights}
        self._arrays = {file: ArrayWriter(self._folder / file, dtype) for file, dtype in dtypes.items()}
        self._arrays[INDPTR].append(np.zeros(1, np.int64))

    @property
    def cells(self) -> int:
        """Cells added so far."""
        return self._arrays[INDPTR].length - 1

    def add(self, lengths: Array, cells: Array, weights: Array) -> None:
        """Append the edges of the next cells.

        Parameters
        ----------
        lengths : int64 [n]
            How many edges each has.
        cells : int [edges]
            Store-wide numbers.
        weights : float [edges]
        """
        edges = self._arrays[INDICES].length
        self._arrays[INDPTR].append(edges + np.cumsum(lengths))
        self._arrays[INDICES].append(cells)
        self._arrays[WEIGHTS].append(weights)

    def skip_to(self, cell: int) -> None:
        """Let the cells up to a number have no neighbours."""
        for first in range(self.cells, cell, ROWS):
            lengths = np.zeros(min(ROWS, cell - first), np.int64)
            self.add(lengths, np.zeros(0, np.uint32), np.zeros(0, np.float32))

    def finish(self) -> GraphRecord:
        """Flush everything and rename the folder to its place."""
        cells = self.cells
        files = {file: array.close() for file, array in self._arrays.items()}
        move_into_place(self._folder, self._place)
        return GraphRecord(cells, files)

    def abandon(self) -> None:
        """Close the files; the folder is swept with the rest of what failed."""
        for array in self._arrays.values():
            with suppress(OSError):  # closing writes what is buffered, and the disk may be full
                array.abandon()
