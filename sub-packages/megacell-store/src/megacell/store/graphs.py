# SPDX-License-Identifier: Apache-2.0
"""Graphs between cells on their way into a store: set aside shard by shard, then written with store-wide numbers.

A shard's cells are known before those of the others, so its edges are kept by row of their file until all shards are
made and each cell has its number (`graph_joining`).
"""

import shutil
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from megacell.store.durable import TEMPORARY, move_into_place
from megacell.store.errors import DataError, UsageError
from megacell.store.manifest import FileRecord, GraphRecord
from megacell.store.shard import ArrayWriter, map_array
from megacell.store.sources.container import is_array
from megacell.store.sources.h5_matrix import ROWS, Matrix

Array = np.ndarray[Any, Any]
FOLDER = "neighbours"
INDPTR, INDICES, WEIGHTS = "indptr.npy", "indices.npy", "weights.npy"
_ROWS_FILE = "rows.npy"
_LONGEST = 200  # bytes of a graph's name: the generation's number follows it in the name of a folder


def check_names(given: str | Iterable[str]) -> tuple[str, ...]:
    """Return the names of one graph or several, each once.

    Raises
    ------
    UsageError
        A name that cannot be a folder's.
    """
    names = (given,) if isinstance(given, str) else tuple(dict.fromkeys(given))
    for name in names:
        plain = name and name.isprintable() and PurePosixPath(name).name == name and not name.startswith(".")
        if not plain or "\\" in name or len(name.encode()) > _LONGEST:
            raise UsageError(f"--neighbours {name!r}: cannot be a folder's name; rename the graph in its files")
    return names


def weights_type(graph: Matrix) -> str:
    """Return the type that holds a graph's weights exactly."""
    stored = graph.node if is_array(graph.node) else graph.node["data"]
    return "float32" if stored.dtype == np.float32 else "float64"


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
    indptr, cells, weights = (map_array(folder / file, record.files.get(file)) for file in (INDPTR, INDICES, WEIGHTS))
    if len(indptr) != record.cells + 1 or len(cells) != len(weights):
        raise DataError(f"{folder}: arrays of different lengths; run `megacell verify {store}`")
    return indptr, cells, weights


class PieceWriter:
    """Sets aside the edges of one shard's cells: for each graph indptr, rows of the file and weights.

    Parameters
    ----------
    folder : Path
        To be made; what a killed process left there is removed.
    graphs : mapping
        Type of the weights by name of the graph.
    """

    def __init__(self, folder: Path, graphs: Mapping[str, str]) -> None:
        self._folder, self._graphs, self._arrays = folder, graphs, dict[str, ArrayWriter]()
        if folder.exists():
            shutil.rmtree(folder)
        if not graphs:
            return
        folder.mkdir()
        self._open(_ROWS_FILE, "int64")
        for name, dtype in graphs.items():
            self._open(f"{name}-{INDPTR}", "int64").append(np.zeros(1, np.int64))
            self._open(f"{name}-{INDICES}", "uint32")
            self._open(f"{name}-{WEIGHTS}", dtype)

    def _open(self, name: str, dtype: str) -> ArrayWriter:
        self._arrays[name] = ArrayWriter(self._folder / name, dtype)
        return self._arrays[name]

    def add(self, graphs: Mapping[str, Matrix], start: int, kept: Array) -> None:
        """Append the edges of some of a source's cells.

        Parameters
        ----------
        graphs : mapping
            The source's own; it may lack some.
        start : int
            Row of the source at which `kept` begins.
        kept : bool [rows]

        Raises
        ------
        DataError
            A weight that is NaN or infinite, or a graph that cannot be read.
        """
        if not self._graphs:
            return
        rows = start + np.flatnonzero(kept)
        self._arrays[_ROWS_FILE].append(rows)
        for name in self._graphs:
            if name in graphs:
                self._add_edges(name, graphs[name], start, kept)
            else:
                self._append(name, np.zeros(len(rows), np.int64), np.zeros(0, np.uint32), np.zeros(0, np.float32))

    def _add_edges(self, name: str, graph: Matrix, start: int, kept: Array) -> None:
        for first, indptr, columns, weights in graph.blocks(start, start + len(kept)):
            finite = np.isfinite(weights)
            if not finite.all():
                row = first + int(np.searchsorted(indptr, np.argmin(finite), side="right")) - 1
                mend = f"mend it, or leave --neighbours {name} out"
                raise DataError(f"{graph.place}, cell {row}: a NaN or infinite weight; {mend}")
            own, lengths = kept[first - start : first - start + len(indptr) - 1], np.diff(indptr)
            inside = np.repeat(own, lengths)
            self._append(name, lengths[own], columns[inside], weights[inside])

    def _append(self, name: str, lengths: Array, columns: Array, weights: Array) -> None:
        edges = self._arrays[f"{name}-{INDICES}"].length
        self._arrays[f"{name}-{INDPTR}"].append(edges + np.cumsum(lengths))
        self._arrays[f"{name}-{INDICES}"].append(columns)
        self._arrays[f"{name}-{WEIGHTS}"].append(weights)

    def finish(self) -> dict[str, FileRecord]:
        """Flush everything; return the files' records."""
        return {name: array.close() for name, array in self._arrays.items()}

    def abandon(self) -> None:
        """Remove what was written."""
        for array in self._arrays.values():
            with suppress(OSError):  # closing writes what is buffered, and the disk may be full
                array.abandon()
        shutil.rmtree(self._folder, ignore_errors=True)


class Piece:
    """What a `PieceWriter` set aside, mapped.

    Attributes
    ----------
    rows : int64 [cells]
        Of its file, by cell of the shard.
    """

    def __init__(self, folder: Path, files: Mapping[str, FileRecord]) -> None:
        self._folder, self._files = folder, files
        self.rows = self._map(_ROWS_FILE)

    def _map(self, name: str) -> Array:
        return map_array(self._folder / name, self._files.get(name))

    def graph(self, name: str) -> tuple[Array, Array, Array]:
        """Map one graph's indptr, rows of the file, and weights."""
        indptr, indices, weights = (self._map(f"{name}-{file}") for file in (INDPTR, INDICES, WEIGHTS))
        return indptr, indices, weights


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
        for left in (self._place, self._folder):
            if left.exists():  # of a process that was killed
                shutil.rmtree(left)
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
