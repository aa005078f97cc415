# SPDX-License-Identifier: Apache-2.0
"""Archives of bionemo-scdl, version 0.1.3, looked at with suspicion: what it does not check is checked here.

An archive's rows come in blocks, each with genes of its own; a block is one source. Nothing is unpickled.
"""

import json
import struct
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from megacell.core.errors import DataError, UsageError
from megacell.store.format.obs import INDEX
from megacell.store.sources.container import Container
from megacell.store.sources.layouts import Csr
from megacell.store.sources.matrix import Matrix

Array = np.ndarray[Any, Any]
# number in header.sch → NumPy's name
TYPES = dict(enumerate(("uint8", "uint16", "uint32", "uint64", "float16", "float32", "float64"), 1))
_WITHOUT_HEADER = {"DATA": "float32", "ROWPTR": "uint64", "COLPTR": "uint32"}
_FILES = {"DATA": "data.npy", "ROWPTR": "row_ptr.npy", "COLPTR": "col_ptr.npy"}
NEIGHBOURS = {"neighbor_indptr.npy": "uint64", "neighbor_indices.npy": "uint32", "neighbor_values.npy": "float32"}
_FOLDERS = {"var": ("var_features", "features"), "obs": ("obs_features",)}


def is_scdl(folder: Path) -> bool:
    """True if a folder is an archive of bionemo-scdl."""
    return all((folder / name).is_file() for name in ("metadata.json", *_FILES.values()))


def count_blocks(archive: Path) -> int:
    """Return how many blocks of genes an archive has."""
    return len(_blocks(archive, "var", [])[0])


class ScdlBlock(Container):
    """The rows of one block of an archive."""

    format = "scdl"

    def __init__(self, path: Path, block: int = 0) -> None:
        self.notes: list[str] = []
        files, ends = _blocks(path, "var", self.notes)
        self._arrays = _arrays(path, self.notes)
        rows = len(self._arrays["ROWPTR"]) - 1
        if ends[-1] != rows:
            raise DataError(
                f"{path}: genes are given for {ends[-1]:,} rows, counts for {rows:,}; make the archive again"
            )
        self._start, self._stop = int(ends[block - 1]) if block else 0, int(ends[block])
        var = _table(files[block])
        self._obs = _obs(path, self._start, self._stop, rows, self.notes)
        super().__init__(path, len(self._obs), var)
        if rows == len(var):
            self.notes.append("as many cells as genes: bionemo-scdl transposes such a matrix if it was CSC; compare it")

    @property
    def obs_columns(self) -> list[str]:
        return list(map(str, self._obs.columns))

    def obs(self, start: int, stop: int, names: Collection[str] | None = None) -> pd.DataFrame:
        rows = self._obs.iloc[start:stop]
        return rows if names is None else rows[[name for name in rows if name in names]]

    def matrix(self, name: str) -> tuple[Matrix, pd.DataFrame]:
        place = f"{self.path}: rows {self._start} to {self._stop}"
        indptr = self._arrays["ROWPTR"][self._start : self._stop + 1]
        node = {"indptr": indptr, "indices": self._arrays["COLPTR"], "data": self._arrays["DATA"]}
        return _Rows(node, place, (self.n_cells, len(self.var))), self.var

    def graphs(self, names: Sequence[str]) -> dict[str, Matrix]:
        if not names or not any((self.path / name).exists() for name in NEIGHBOURS):
            return {}
        if len(names) > 1:
            fix = "the archive has one graph, whose name it does not tell"
            raise UsageError(f"{self.path}: {fix}; give one --neighbours, which it shall be called")
        indptr, indices, data = _neighbours(self.path, len(self._arrays["ROWPTR"]) - 1)
        pointers = indptr[self._start : self._stop + 1]
        if without := self._stop - self._start + 1 - len(pointers):
            pointers = np.append(pointers, np.full(without, indptr[-1]))
            self.notes.append(f"{min(without, self.n_cells):,} cells lie behind the archive's graph: no neighbours")
        node = {"indptr": pointers, "indices": indices, "data": data}
        place = f"{self.path}: neighbours of rows {self._start} to {self._stop}"
        return {names[0]: _Edges(node, place, self._start, self.n_cells)}

    def close(self) -> None:
        """Nothing is open but maps."""


class _Rows(Csr):
    """Some rows of the archive's arrays."""

    of_a_larger = True

    def stored(self) -> int:
        return int(self.indptr[-1]) - int(self.indptr[0])


class _Edges(_Rows):
    """The archive's graph among the rows of one block; rows of the archive become rows of the block."""

    def __init__(self, node: Any, place: str, start: int, rows: int) -> None:
        super().__init__(node, place, (rows, rows))
        self._start = start

    def _read(self, low: int, high: int, most: int) -> tuple[Array, Array]:
        with self.reading():
            indices = self.indices[int(low) : int(high)].astype(np.int64) - self._start
            if len(indices) and (indices.min() < 0 or indices.max() >= most):
                raise ValueError(f"an edge leads outside rows {self._start} to {self._start + most}")
        return indices.astype(np.int32), np.array(self.data[int(low) : int(high)])


def _neighbours(archive: Path, rows: int) -> tuple[Array, Array, Array]:
    """Map indptr, rows and weights of an archive's graph; no header tells of them, so their sizes must agree."""
    arrays = []
    for name, dtype in NEIGHBOURS.items():
        path = archive / name
        try:
            arrays.append(np.asarray(np.memmap(path, dtype, "r")) if path.stat().st_size else np.zeros(0, dtype))
        except (OSError, ValueError) as error:
            raise DataError(f"{path}: cannot be read ({error}); make the archive again") from None
    indptr, indices, weights = arrays
    if not 1 <= len(indptr) <= rows + 1 or indptr[0] != 0 or not indptr[-1] == len(indices) == len(weights):
        sizes = f"{len(indptr):,} pointers for {rows:,} rows, {len(indices):,} neighbours, {len(weights):,} weights"
        raise DataError(f"{archive}: its graph does not agree with itself ({sizes}); make the archive again")
    return indptr, indices, weights


def _blocks(archive: Path, which: str, notes: list[str]) -> tuple[list[Path], Array]:
    """Return an index's parquet files in the order of their blocks, and the row at which each block ends.

    Ten or more files joined leave ``dataframe_0`` beside ``dataframe_00``, which shifts every block to another file's
    genes: names are zero-filled to the width of the number of blocks, so files of another width are stale.
    """
    folder = next((archive / name for name in _FOLDERS[which] if (archive / name).is_dir()), None)
    if folder is None:
        raise DataError(f"{archive}: has no {_FOLDERS[which][0]}, so no genes; make the archive again")
    try:
        ends = np.load(folder / "cumulative_sum_index.npy", allow_pickle=False)
    except (OSError, ValueError) as error:
        raise DataError(
            f"{folder}: its cumulative_sum_index.npy cannot be read ({error}); make the archive again"
        ) from None
    n = len(ends) - 1
    if ends.ndim != 1 or ends.dtype.kind not in "iu" or n < 1 or ends[0] != -1 or (np.diff(ends[1:]) <= 0).any():
        raise DataError(f"{folder}: its cumulative_sum_index.npy is no ascending list of rows; make the archive again")
    files = sorted(folder.rglob("*.parquet"))
    if len(files) != n:
        wanted = [folder / f"dataframe_{i:0{len(str(n))}d}.parquet" for i in range(n)]
        if not all(path.is_file() for path in wanted):
            raise DataError(f"{folder}: {len(files)} tables for {n} blocks of rows; make the archive again")
        notes.append(f"{len(files) - n} stale tables in {folder.name} left aside: they shift blocks to others' genes")
        files = wanted
    return files, ends[1:]


def _table(path: Path) -> pd.DataFrame:
    try:
        frame: pd.DataFrame = pq.read_table(path).to_pandas(ignore_metadata=True)
    except (OSError, pa.ArrowInvalid) as error:
        raise DataError(f"{path}: cannot be read ({error}); make the archive again") from None
    return frame


def _obs(path: Path, start: int, stop: int, rows: int, notes: list[str]) -> pd.DataFrame:
    names = pd.Index([f"row-{i}" for i in range(start, stop)], dtype=object)  # the archive drops the cells' names
    if not (path / "obs_features").is_dir():
        return pd.DataFrame(index=names)
    files, ends = _blocks(path, "obs", notes)
    starts = np.concatenate([np.zeros(1, np.int64), ends[:-1]])
    touched = np.flatnonzero((ends > start) & (starts < stop))
    tables = [_table(files[i]) for i in touched]
    lengths = [int(ends[i] - starts[i]) for i in touched]
    if ends[-1] != rows or any(len(t) != n for t, n in zip(tables, lengths, strict=True) if t.shape[1]):
        notes.append("the cells' metadata do not fit the rows: left out")
        return pd.DataFrame(index=names)
    tables = [t if t.shape[1] else pd.DataFrame(index=range(n)) for t, n in zip(tables, lengths, strict=True)]
    first = int(starts[touched[0]])
    obs = pd.concat(tables, ignore_index=True).iloc[start - first : stop - first]
    if INDEX in obs:  # our own export keeps the names there
        names = pd.Index(obs.pop(INDEX).astype(str), dtype=object, name=None)
    return obs.set_axis(names, axis=0)


def _arrays(archive: Path, notes: list[str]) -> dict[str, Array]:
    """Map the three arrays; types by the header, proven by the files' sizes and contents, which a stale one is not."""
    types = _header_types(archive, notes)
    try:
        rows = json.loads((archive / "metadata.json").read_bytes())["num_rows"]
        sizes = {name: (archive / file).stat().st_size for name, file in _FILES.items()}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{archive}: metadata.json or an array cannot be read ({error}); make it again") from None
    if not isinstance(rows, int) or rows < 1:
        raise DataError(f"{archive}: metadata.json says {rows} rows; make the archive again")
    types["ROWPTR"] = _fitting(archive, "ROWPTR", types["ROWPTR"], sizes["ROWPTR"], rows + 1, notes)
    pointers = np.memmap(archive / _FILES["ROWPTR"], types["ROWPTR"], "r")
    values = int(pointers[-1])
    if pointers[0] != 0 or values < 1:
        raise DataError(f"{archive}: row_ptr.npy leads from {pointers[0]} to {values}; make the archive again")
    found: dict[str, Array] = {"ROWPTR": pointers}
    for name in ("COLPTR", "DATA"):
        types[name] = _fitting(archive, name, types[name], sizes[name], values, notes)
        found[name] = np.memmap(archive / _FILES[name], types[name], "r")
    found["DATA"] = _by_content(archive, found["DATA"], notes)
    return {name: np.asarray(array) for name, array in found.items()}


def _fitting(archive: Path, name: str, stated: str, size: int, length: int, notes: list[str]) -> str:
    """Return the type with which a file holds so many values: the stated one, or the only wider one that does.

    A narrower one is never believed: a file cut short by half looks the same.
    """
    width, rest = divmod(size, length)
    own = np.dtype(stated).itemsize
    if width == own and not rest:
        return stated
    unsigned = {2: "uint16", 4: "uint32", 8: "uint64"}
    if rest or width < own or width not in unsigned:
        what = f"{size:,} bytes hold no {length:,} values of {stated}"
        raise DataError(f"{archive / _FILES[name]}: {what}: cut short, or a stale header; make the archive again")
    found = unsigned[width].replace("uint", "float") if name == "DATA" else unsigned[width]
    notes.append(f"header.sch is stale: {_FILES[name]} is {found}, not {stated}")
    return found


def _by_content(archive: Path, data: Array, notes: list[str]) -> Array:
    """Return values under their other reading of the same width where the stated one makes no sense of them.

    A small whole number read as a float is next to nothing, a float read as a whole number is huge.
    """
    kinds = {"float16": "uint16", "float32": "uint32", "float64": "uint64"}
    other = kinds.get(data.dtype.name) or {b: a for a, b in kinds.items()}.get(data.dtype.name)
    if other is None:
        return data
    head = np.array(data[: 1 << 16])
    sense = [_makes_sense(head), _makes_sense(head.view(other))]
    if sense == [False, True]:
        notes.append(f"header.sch is stale: data.npy is {other}, not {data.dtype.name}")
        return data.view(other)
    if not sense[0]:
        raise DataError(
            f"{archive / 'data.npy'}: as {data.dtype.name} its values are no counts; make the archive again"
        )
    return data


def _makes_sense(values: Array) -> bool:
    largest = float(values.max())
    return bool(np.isfinite(largest)) and 1e-4 < largest < (1 << 29)


def _header_types(archive: Path, notes: list[str]) -> dict[str, str]:
    """Read the arrays' types from header.sch; what bionemo-scdl assumes without one, if there is none."""
    path = archive / "header.sch"
    try:
        content = path.read_bytes()
    except OSError:
        notes.append("no header.sch: the types of older archives assumed")
        return dict(_WITHOUT_HEADER)
    try:
        if content[:4] != b"SCDL":
            raise ValueError("it does not begin with SCDL")
        position, types = 12, {}
        (arrays,) = struct.unpack_from(">I", content, position)
        position += 4
        for _ in range(min(arrays, 16)):
            (length,) = struct.unpack_from(">I", content, position)
            name = content[position + 4 : position + 4 + length].decode()
            position += 4 + length
            _, number, shaped = struct.unpack_from(">QIB", content, position)
            position += 13
            if shaped:
                position += 4 + 4 * struct.unpack_from(">I", content, position)[0]
            types[name] = TYPES[number]
        return {name: types[name] for name in _FILES}
    except (ValueError, KeyError, IndexError, struct.error, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read ({error}); delete it if data are float32, or make it again") from None
