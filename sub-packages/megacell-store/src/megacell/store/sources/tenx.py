# SPDX-License-Identifier: Apache-2.0
"""What Cell Ranger writes: its .h5 files (versions 2 and 3) and its folders of matrix.mtx, features and barcodes."""

import gzip
import tempfile
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np
import pandas as pd
import pyarrow as pa

from megacell.core.errors import DataError
from megacell.core.files import TEMPORARY
from megacell.store.format.blocks import VALUES, Block, cut_blocks, scatter, spool
from megacell.store.sources.anndata_file import open_h5
from megacell.store.sources.container import Container
from megacell.store.sources.layouts import Csr
from megacell.store.sources.matrix import DAMAGE, Matrix, check_complete, first_line

Array = np.ndarray[Any, Any]


class TenxH5(Container):
    """One .h5 file: features x barcodes in compressed columns, which are the rows of cells x genes."""

    format = "10x-h5"

    def __init__(self, path: Path) -> None:
        self.file = open_h5(path)
        groups = [name for name in self.file if "barcodes" in self.file[name]]
        if len(groups) != 1:
            raise DataError(f"{path}: {len(groups)} groups with barcodes; give a 10x .h5 file of one genome, or .h5ad")
        self.group = self.file[groups[0]]
        if "features" in self.group:
            features = self.group["features"]
            var = {"gene_ids": features["id"], "feature_types": features["feature_type"]}
            var |= {"genome": features["genome"]} if "genome" in features else {}
            names = features["name"]
        else:
            var, names = {"gene_ids": self.group["genes"]}, self.group["gene_names"]
        frame = pd.DataFrame({key: _decode(node) for key, node in var.items()}, index=_decode(names))
        self._barcodes = self.group["barcodes"]
        super().__init__(path, len(self._barcodes), frame)

    def obs(self, start: int, stop: int, names: Collection[str] | None = None) -> pd.DataFrame:
        rows = slice(start, min(stop, self.n_cells))
        return pd.DataFrame(index=pd.Index(_decode(self._barcodes, rows), dtype=object))

    def matrix(self, name: str) -> tuple[Matrix, pd.DataFrame]:
        place = f"{self.path}: {name}"
        check_complete(self.group["shape"])
        shape = self.group["shape"][:]
        if tuple(shape) != (len(self.var), self.n_cells):
            raise DataError(f"{place}: shape {tuple(shape)} does not fit; the file is damaged, fetch it again")
        return Csr(self.group, place, (self.n_cells, len(self.var))), self.var

    def close(self) -> None:
        self.file.close()


def _decode(node: Any, rows: slice = slice(None)) -> Array:
    check_complete(node)
    return np.array([v.decode(errors="replace") if isinstance(v, bytes) else str(v) for v in node[rows]], object)


class TenxFolder(Container):
    """A folder of matrix.mtx, features.tsv (or genes.tsv) and barcodes.tsv, gzipped or not."""

    format = "mtx"

    def __init__(self, path: Path) -> None:
        self.mtx = find_part(path, "matrix.mtx")
        features = list(_lines(find_part(path, "features.tsv", "genes.tsv")))
        # of raw droplets there are millions: kept as bytes one after the other
        self._barcodes = pa.array((line[0] for line in _lines(find_part(path, "barcodes.tsv"))), pa.large_string())
        if not features or min(map(len, features)) < 2:
            raise DataError(f"{path}: the table of features needs ids and names, separated by tabs; fetch it again")
        var = pd.DataFrame({"gene_ids": [line[0] for line in features]}, index=[line[1] for line in features])
        if min(map(len, features)) > 2:
            var["feature_types"] = [line[2] for line in features]
        super().__init__(path, len(self._barcodes), var)

    def obs(self, start: int, stop: int, names: Collection[str] | None = None) -> pd.DataFrame:
        return pd.DataFrame(index=pd.Index(self._barcodes[start:stop].to_pylist(), dtype=object))

    def close(self) -> None:
        """Nothing is open."""

    def matrix(self, name: str) -> tuple[Matrix, pd.DataFrame]:
        return MatrixMarket(self.mtx, f"{self.path}: {self.mtx.name}", (self.n_cells, len(self.var))), self.var


def find_part(folder: Path, *names: str) -> Path:
    """Return one of a 10x folder's files, gzipped or not.

    Raises
    ------
    DataError
        None of the names is there.
    """
    for name in names:
        for path in (folder / name, folder / f"{name}.gz"):
            if path.is_file():
                return path
    raise DataError(f"{folder}: has no {' or '.join(names)} (.gz); give the whole folder that Cell Ranger wrote")


def _open(path: Path) -> IO[str]:
    if path.suffix == ".gz":
        return gzip.open(path, "rt", encoding="utf-8", newline="")
    return open(path, encoding="utf-8", newline="")


def _lines(path: Path) -> Iterator[list[str]]:
    """Yield the fields of each line that has some."""
    try:
        with _open(path) as file:
            yield from (line.split("\t") for text in file if (line := text.rstrip("\r\n")))
    except DAMAGE as error:
        raise DataError(f"{path}: cannot be read ({first_line(error)}); fetch it again") from None


class MatrixMarket(Matrix):
    """Coordinates as text, features x cells, in any order: parsed in pieces and scattered into temporary files."""

    def __init__(self, path: Path, place: str, shape: tuple[int, int]) -> None:
        super().__init__(path, place)
        self.shape = shape
        with self.reading(), _open(path) as file:
            head, self._skip = file.readline(), 1
            while (line := file.readline()).startswith("%"):
                self._skip += 1
            words, sizes = head.lower().split(), line.split()
            if words[:3] != ["%%matrixmarket", "matrix", "coordinate"] or words[4:] != ["general"]:
                raise ValueError(f"head {head.strip()!r}")
            rows, columns, self._stored = map(int, sizes)
            if (columns, rows) != shape:
                raise ValueError(f"{rows} x {columns} for {shape[1]} features and {shape[0]} barcodes")

    def stored(self) -> int:
        return self._stored

    def blocks(self, start: int, stop: int, rows: int = 1 << 14) -> Iterator[Block]:
        lengths, total = np.zeros(stop - start, np.int64), 0
        for _, cells, _ in self._pieces():
            inside = cells[(cells >= start) & (cells < stop)] - start
            lengths += np.bincount(inside, minlength=len(lengths))
            total += len(cells)
        if total != self._stored:
            raise DataError(f"{self.place}: {total:,} values, its head says {self._stored:,}; fetch it again")
        indptr = np.zeros(len(lengths) + 1, np.int64)
        np.cumsum(lengths, out=indptr[1:])
        with tempfile.TemporaryDirectory(prefix="rows-", suffix=TEMPORARY, dir=self.scratch) as folder:
            columns = spool(Path(folder) / "columns", np.dtype(np.int32), int(indptr[-1]))
            values = spool(Path(folder) / "values", np.dtype(np.float64), int(indptr[-1]))
            free = indptr[:-1].copy()
            for genes, cells, data in self._pieces():
                scatter(genes, cells, data, start, free, columns, values)
            yield from cut_blocks(start, indptr, columns, values, rows)

    def sample(self, rows: Array) -> Block:
        number = np.full(self.shape[0], -1, np.int32)
        number[rows] = np.arange(len(rows), dtype=np.int32)
        parts = []
        for genes, cells, data in self._pieces():
            taken = number[cells] >= 0
            parts.append((number[cells[taken]], genes[taken], data[taken]))
        empty = np.zeros(0, np.int32), np.zeros(0, np.int32), np.zeros(0)
        row, column, value = (np.concatenate(own) for own in zip(empty, *parts, strict=True))
        order = np.argsort(row, kind="stable")
        indptr = np.zeros(len(rows) + 1, np.int64)
        np.cumsum(np.bincount(row, minlength=len(rows)), out=indptr[1:])
        return 0, indptr, column[order], value[order]

    def _pieces(self) -> Iterator[tuple[Array, Array, Array]]:
        """Yield genes, cells (int32, from 0) and values (float64) in the file's order."""
        if not self._stored:
            return
        types = {0: np.int64, 1: np.int64, 2: np.float64}
        try:
            with _open(self.node) as file:
                reader = pd.read_csv(
                    file, sep=" ", header=None, skiprows=self._skip + 1, dtype=types, chunksize=VALUES // 4
                )
                for piece in reader:
                    if piece.shape[1] != 3:
                        raise ValueError(f"lines of {piece.shape[1]} numbers")
                    genes, cells, values = (piece[i].to_numpy() - (i < 2) for i in range(3))
                    last = self.shape[1] - 1, self.shape[0] - 1
                    if min(genes.min(), cells.min()) < 0 or genes.max() > last[0] or cells.max() > last[1]:
                        raise ValueError("a coordinate outside the matrix")
                    yield genes.astype(np.int32), cells.astype(np.int32), values.astype(np.float64)
        except DAMAGE as error:
            raise DataError(f"{self.place}: cannot be read ({first_line(error)}); fetch it again") from error
