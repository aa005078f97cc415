# SPDX-License-Identifier: Apache-2.0
"""The layouts of a matrix in HDF5 and Zarr: dense, CSR, CSC, and sums of several."""

import tempfile
from abc import ABC
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megacell.core.errors import DataError
from megacell.core.files import TEMPORARY
from megacell.core.jit import compiled
from megacell.store.format.blocks import ROWS, VALUES, Array, Block, cut_blocks, scatter, spool
from megacell.store.sources.matrix import Matrix, check_complete


def open_matrix(node: Any, place: str, n_rows: int | None = None, n_columns: int | None = None) -> Matrix:
    """Open a dataset or sparse group of an AnnData file.

    Raises
    ------
    DataError
        An encoding that is not known, or a shape that does not fit obs and var.
    """
    if hasattr(node, "shape") and hasattr(node, "dtype"):  # a dataset of HDF5, an array of Zarr
        matrix: Matrix = Dense(node, place)
    else:
        encoding = str(node.attrs.get("encoding-type", node.attrs.get("h5sparse_format", "")))
        kind: type[Matrix] | None = {"csr_matrix": Csr, "csr": Csr, "csc_matrix": Csc, "csc": Csc}.get(encoding)
        if kind is None:
            raise DataError(f"{place}: encoding {encoding or 'unknown'!r} is not a matrix; write it with anndata again")
        matrix = kind(node, place)
    if (n_rows, n_columns) != (None, None) and matrix.shape != (n_rows, n_columns):
        raise DataError(f"{place}: is {matrix.shape}, but obs and var say {(n_rows, n_columns)}; write the file again")
    return matrix


def _values(data: Array) -> Array:
    """Return float32 as it is, all else as float64, which holds every count exactly."""
    return data if data.dtype == np.float32 else data.astype(np.float64)


class Dense(Matrix):
    """A two-dimensional dataset."""

    def __init__(self, node: Any, place: str) -> None:
        super().__init__(node, place)
        if len(node.shape) != 2 or node.dtype.kind not in "fiub":
            what = f"a {node.dtype} array of {len(node.shape)} dimensions is no matrix of counts"
            raise DataError(f"{place}: {what}; name another one with --counts")
        with self.reading():
            check_complete(node)
        self.shape = (int(node.shape[0]), int(node.shape[1]))

    def blocks(self, start: int, stop: int, rows: int = ROWS) -> Iterator[Block]:
        step = max(1, min(rows, VALUES // max(1, self.shape[1])))
        for first in range(start, stop, step):
            with self.reading():
                block = self.node[first : min(first + step, stop)]
            yield (first, *self._sparse(block))

    def sample(self, rows: Array) -> Block:
        with self.reading():
            runs = [self.node[a:b] for a, b in _runs(rows)]
        return (0, *self._sparse(np.concatenate(runs) if runs else np.zeros((0, self.shape[1]), np.float32)))

    def stored(self) -> int:
        rows = np.unique(np.linspace(0, self.shape[0] - 1, 32).astype(np.int64))
        return int(self.sample(rows)[1][-1] * self.shape[0] / max(1, len(rows)))

    @staticmethod
    def _sparse(block: Array) -> tuple[Array, Array, Array]:
        row, column = np.nonzero(block)
        indptr = np.zeros(len(block) + 1, np.int64)
        np.cumsum(np.bincount(row, minlength=len(block)), out=indptr[1:])
        return indptr, column.astype(np.int32), _values(block[row, column])


class Columns(Dense):
    """A dense dataset with cells in its columns, as Loom has it."""

    def __init__(self, node: Any, place: str) -> None:
        super().__init__(node, place)
        self.shape = self.shape[1], self.shape[0]
        chunk = node.chunks[1] if node.chunks else 64
        self._step = max(chunk, VALUES // max(1, self.shape[1]) // chunk * chunk)  # whole chunks are read once

    def blocks(self, start: int, stop: int, rows: int = ROWS) -> Iterator[Block]:
        for low in range(start - start % self._step, stop, self._step):
            first, last = max(low, start), min(low + self._step, stop)
            with self.reading():
                block = np.ascontiguousarray(self.node[:, first:last].T)
            for begin in range(0, last - first, rows):
                yield (first + begin, *self._sparse(block[begin : begin + rows]))

    def sample(self, rows: Array) -> Block:
        with self.reading():
            runs = [self.node[:, a:b].T for a, b in _runs(rows)]
        return (0, *self._sparse(np.concatenate(runs) if runs else np.zeros((0, self.shape[1]), np.float32)))


class Sum(Matrix):
    """Several matrices of the same cells and genes, added up (spliced and unspliced, say)."""

    def __init__(self, parts: Sequence[Matrix], place: str) -> None:
        super().__init__(None, place)
        self.parts, self.shape = parts, parts[0].shape

    def blocks(self, start: int, stop: int, rows: int = ROWS) -> Iterator[Block]:
        for part in self.parts:
            part.scratch = self.scratch
        streams = [part.blocks(start, stop, rows) for part in self.parts]
        held = [next(stream, None) for stream in streams]
        while all(block is not None for block in held):
            blocks = [block for block in held if block is not None]
            n = min(len(block[1]) - 1 for block in blocks)
            yield blocks[0][0], *_beside([_rows(block, 0, n) for block in blocks])
            held = [
                _rows(block, n, len(block[1]) - 1) if len(block[1]) - 1 > n else next(stream, None)
                for block, stream in zip(blocks, streams, strict=True)
            ]

    def sample(self, rows: Array) -> Block:
        return 0, *_beside([part.sample(rows) for part in self.parts])

    def stored(self) -> int:
        return sum(part.stored() for part in self.parts)


def _rows(block: Block, start: int, stop: int) -> Block:
    first, indptr, columns, values = block
    low, high = indptr[start], indptr[stop]
    return first + start, indptr[start : stop + 1] - low, columns[low:high], values[low:high]


def _beside(blocks: Sequence[Block]) -> tuple[Array, Array, Array]:
    """Return blocks of the same rows as one whose rows hold the values of all; equal columns are summed later."""
    row = np.concatenate([np.repeat(np.arange(len(b[1]) - 1), np.diff(b[1])) for b in blocks])
    order = np.argsort(row, kind="stable")
    indptr = np.sum([b[1] for b in blocks], axis=0)
    values = np.concatenate([b[3].astype(np.float64) for b in blocks])[order]
    return indptr, np.concatenate([b[2] for b in blocks])[order], values


class _Sparse(Matrix, ABC):
    """What CSR and CSC share: three datasets, and the checks without which a compiled loop would read astray."""

    axis = 0  # of the shape, that is compressed
    of_a_larger = False  # True if indptr leads to a part of the values only

    def __init__(self, node: Any, place: str, shape: tuple[int, int] | None = None) -> None:
        super().__init__(node, place)
        with self.reading():
            if shape is None:
                shape = node.attrs["shape"] if "shape" in node.attrs else node.attrs["h5sparse_shape"]
            self.indptr, self.indices, self.data = node["indptr"], node["indices"], node["data"]
            self.shape = (int(shape[0]), int(shape[1]))
            check_complete(self.indptr)
            if self.data.dtype.kind not in "fiub" or self.indices.dtype.kind not in "iu":
                raise ValueError(f"values of type {self.data.dtype}")
            if self.indices.shape != self.data.shape:
                raise ValueError(f"{self.indices.shape} indices for {self.data.shape} values")
            self._check_ends()
            for array in (self.indices, self.data):
                check_complete(array)
            for array in (self.indices, self.data):  # a chunk that Zarr does not find reads as zeros, without a word
                if getattr(array, "nchunks_initialized", 0) < getattr(array, "nchunks", 0):
                    raise ValueError(f"{array.nchunks - array.nchunks_initialized} chunks of {array.name} are missing")

    def _check_ends(self) -> None:
        """Raise ValueError unless indptr has an entry more than rows (or columns) and leads to all values."""
        n, values = self.shape[self.axis], self.data.shape[0]
        if self.indptr.shape != (n + 1,):
            raise ValueError(f"indptr of {self.indptr.shape} entries for a matrix of {self.shape}")
        first, last = (int(self.indptr[at : at + 1][0]) for at in (0, n))
        if not self.of_a_larger and (first, last) != (0, values):
            raise ValueError(f"indptr leads from {first} to {last}, there are {values} values")

    def stored(self) -> int:
        return int(self.data.shape[0])

    def _pointers(self, start: int, stop: int) -> Array:
        """Return indptr[start:stop + 1] as int64, checked."""
        with self.reading():
            pointers: Array = self.indptr[start : stop + 1].astype(np.int64)
            if pointers[0] < 0 or (np.diff(pointers) < 0).any() or pointers[-1] > self.data.shape[0]:
                raise ValueError("indptr does not fit the values")
        return pointers

    def _read(self, low: int, high: int, most: int) -> tuple[Array, Array]:
        """Return indices as int32 in 0 … most - 1 and values, from position `low` up to `high`."""
        with self.reading():
            indices, values = self.indices[int(low) : int(high)], _values(self.data[int(low) : int(high)])
            if len(indices) and (indices.min() < 0 or indices.max() >= most):
                raise ValueError(f"an index outside 0 … {most - 1}")
        return indices.astype(np.int32, copy=False), values


class Csr(_Sparse):
    """Compressed rows."""

    def blocks(self, start: int, stop: int, rows: int = ROWS) -> Iterator[Block]:
        for begin in range(start, stop, ROWS):
            pointers = self._pointers(begin, min(begin + ROWS, stop))
            first = 0
            while first < len(pointers) - 1:
                last = int(np.searchsorted(pointers, pointers[first] + VALUES, side="right")) - 1
                last = min(max(last, first + 1), first + rows, len(pointers) - 1)
                columns, values = self._read(pointers[first], pointers[last], self.shape[1])
                yield begin + first, pointers[first : last + 1] - pointers[first], columns, values
                first = last

    def sample(self, rows: Array) -> Block:
        return 0, *_join([block for a, b in _runs(rows) for block in self.blocks(a, b)])


class Csc(_Sparse):
    """Compressed columns: rows are counted, then scattered into temporary memory-mapped files."""

    axis = 1

    def blocks(self, start: int, stop: int, rows: int = ROWS) -> Iterator[Block]:
        lengths = np.zeros(stop - start, np.int64)
        for _, indices, _ in self._stream(with_values=False):
            _count(indices, start, lengths)
        indptr = np.zeros(len(lengths) + 1, np.int64)
        np.cumsum(lengths, out=indptr[1:])
        with tempfile.TemporaryDirectory(prefix="rows-", suffix=TEMPORARY, dir=self.scratch) as folder:
            dtype = np.float32 if self.data.dtype == np.float32 else np.float64
            columns = spool(Path(folder) / "columns", np.dtype(np.int32), int(indptr[-1]))
            values = spool(Path(folder) / "values", np.dtype(dtype), int(indptr[-1]))
            free = indptr[:-1].copy()
            for pointers, indices, data in self._stream(with_values=True):
                columns_of = _columns_of(pointers, len(indices))
                scatter(columns_of, indices, data, start, free, columns, values)
            yield from cut_blocks(start, indptr, columns, values, rows)

    def sample(self, rows: Array) -> Block:
        number = np.full(self.shape[0], -1, np.int32)
        number[rows] = np.arange(len(rows), dtype=np.int32)
        parts = []
        for (first, pointers), indices, data in self._stream(with_values=True):
            taken = number[indices] >= 0
            column = first + np.searchsorted(pointers, np.flatnonzero(taken), side="right") - 1
            parts.append((number[indices[taken]], column.astype(np.int32), data[taken]))
        row = np.concatenate([p[0] for p in parts]) if parts else np.zeros(0, np.int32)
        order = np.argsort(row, kind="stable")
        indptr = np.zeros(len(rows) + 1, np.int64)
        np.cumsum(np.bincount(row, minlength=len(rows)), out=indptr[1:])
        columns = np.concatenate([p[1] for p in parts])[order] if parts else np.zeros(0, np.int32)
        values = np.concatenate([p[2] for p in parts])[order] if parts else np.zeros(0, np.float64)
        return 0, indptr, columns, values

    def _stream(self, *, with_values: bool) -> Iterator[tuple[tuple[int, Array], Array, Array]]:
        """Yield pieces of the stored values: (first column, where each column ends within the piece), rows, values.

        The piece's k-th column number is ``first + searchsorted(pointers, k, "right") - 1``.
        """
        pointers = self._pointers(0, self.shape[1])
        empty = np.zeros(0, np.float32)
        for low in range(int(pointers[0]), int(pointers[-1]), VALUES):
            high = min(low + VALUES, int(pointers[-1]))
            first = int(np.searchsorted(pointers, low, side="right")) - 1
            last = int(np.searchsorted(pointers, high, side="left"))
            if with_values:
                indices, values = self._read(low, high, self.shape[0])
            else:
                with self.reading():
                    indices, values = self.indices[low:high], empty
                    if indices.min() < 0 or indices.max() >= self.shape[0]:
                        raise ValueError(f"an index outside 0 … {self.shape[0] - 1}")
                indices = indices.astype(np.int32, copy=False)
            yield (first, np.maximum(pointers[first : last + 1] - low, 0)), indices, values


@compiled
def _count(rows: Any, start: int, lengths: Any) -> None:
    for k in range(len(rows)):
        row = rows[k] - start
        if 0 <= row < len(lengths):
            lengths[row] += 1


@compiled
def _columns_of(pointers: Any, length: int) -> Any:
    """Return the column number of each value of a piece: int32 [length]."""
    column, starts = pointers
    columns = np.empty(length, np.int32)
    c = 0
    for k in range(length):
        while c + 1 < len(starts) and starts[c + 1] <= k:
            c += 1
        columns[k] = column + c
    return columns


def _runs(rows: Array) -> list[tuple[int, int]]:
    """Return ascending numbers as runs (start, stop)."""
    if not len(rows):
        return []
    cuts = np.flatnonzero(np.diff(rows) != 1) + 1
    return [(int(run[0]), int(run[-1]) + 1) for run in np.split(rows, cuts)]


def _join(blocks: list[Block]) -> tuple[Array, Array, Array]:
    """Return several blocks as one."""
    if not blocks:
        return np.zeros(1, np.int64), np.zeros(0, np.int32), np.zeros(0, np.float32)
    lengths = np.concatenate([np.diff(block[1]) for block in blocks])
    indptr = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)])
    return indptr, np.concatenate([b[2] for b in blocks]), np.concatenate([b[3] for b in blocks])
