# SPDX-License-Identifier: Apache-2.0
"""Neighbour graphs while shards are written: a piece of each shard, joined when all of them exist."""

from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path, PurePosixPath

import numpy as np

from megacell.core.errors import DataError, UsageError
from megacell.core.files import remove_tree
from megacell.store.format.graph import INDICES, INDPTR, WEIGHTS, Array
from megacell.store.format.manifest import FileRecord
from megacell.store.format.shard import ArrayWriter, map_array
from megacell.store.sources.container import is_array
from megacell.store.sources.matrix import Matrix

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
        self._remove()
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
                fix = f"fix it, or leave --neighbours {name} out"
                raise DataError(f"{graph.place}, cell {row}: a NaN or infinite weight; {fix}")
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
        with suppress(OSError):
            self._remove()

    def _remove(self) -> None:
        remove_tree(self._folder.parent.parent, f"{self._folder.parent.name}/{self._folder.name}")


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
