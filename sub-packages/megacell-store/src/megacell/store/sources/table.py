# SPDX-License-Identifier: Apache-2.0
"""One table of an AnnData file (obs, var, raw's var), read by rows: that of ten million cells is never held at once."""

import warnings
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from megacell.core.errors import DataError
from megacell.store.processes.watchdog import watched
from megacell.store.sources.container import ROW_NAMES, is_array
from megacell.store.sources.matrix import DAMAGE, check_complete, check_stored, first_line, is_of_machine

Array = np.ndarray[Any, Any]
_NULLABLE: dict[str, Callable[[Array, Array], Any]] = {
    "nullable-integer": pd.arrays.IntegerArray,
    "nullable-boolean": pd.arrays.BooleanArray,
    "nullable-string-array": lambda values, mask: pd.Series(values).mask(mask).astype("string").array,
}


class Frame:
    """A table; opening it checks that all columns are as long as the index.

    Parameters
    ----------
    group : group of HDF5 or Zarr
        That holds the table.
    name : str
        Of the table within the group.
    path : Path
        The file, for messages.

    Attributes
    ----------
    columns : list of str
        In the file's order.

    Raises
    ------
    DataError
        What is there is no table, or a damaged one.
    """

    def __init__(self, group: Any, name: str, path: Path) -> None:
        self._where = f"{path}: {name}"
        try:
            with watched():
                self._open(group[name])
        except DAMAGE as error:
            if is_of_machine(error):
                raise
            raise self._damaged(error) from error

    def __len__(self) -> int:
        return self._length

    def _open(self, node: Any) -> None:
        if is_array(node) or str(node.attrs.get("encoding-type", "")) != "dataframe":
            raise DataError(f"{self._where} is no table; write the file again with anndata")
        self._node, self._index = node, str(node.attrs["_index"])
        index = node[self._index]
        if not is_array(index) or len(index.shape) != 1:
            raise ValueError("the index is no list of names")
        self._length = int(index.shape[0])
        order = node.attrs["column-order"]
        self.columns = [str(name.decode() if isinstance(name, bytes) else name) for name in np.asarray(order).ravel()]
        for column in (self._index, *self.columns):
            for array in _parts(node[column]):
                if array.shape != (self._length,):
                    raise ValueError(f"{column} has {array.shape} entries, the index {self._length}")
                if array.dtype.kind == "V":
                    raise ValueError(f"{column} holds records")
                check_complete(array)

    def read(self, start: int = 0, stop: int | None = None, names: Collection[str] | None = None) -> pd.DataFrame:
        """Return some rows; with `names`, only these columns, and the index only where ROW_NAMES is among them."""
        rows = slice(start, self._length if stop is None else min(stop, self._length))
        wanted = self.columns if names is None else [column for column in self.columns if column in names]
        with_index = names is None or ROW_NAMES in names
        try:
            with watched(), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of old encodings, which are read all the same
                index: Any = pd.RangeIndex(rows.start, rows.stop)
                if with_index:
                    index = pd.Index(_column(self._node[self._index], rows))
                return pd.DataFrame({name: _column(self._node[name], rows) for name in wanted}, index)
        except DAMAGE as error:
            if is_of_machine(error):
                raise
            raise self._damaged(error) from error

    def _damaged(self, error: BaseException) -> DataError:
        return DataError(f"{self._where} cannot be read ({first_line(error)}); the file is damaged, fetch it again")


def _parts(node: Any) -> list[Any]:
    """Return the arrays of a column that have an entry a row; none of an encoding that only AnnData knows."""
    if is_array(node):
        return [node]
    if _encoding(node) == "categorical":
        return [node["codes"]]
    return [node["values"], node["mask"]] if _encoding(node) in _NULLABLE else []


def _encoding(node: Any) -> str:
    return str(node.attrs.get("encoding-type", ""))


def _column(node: Any, rows: slice) -> Any:
    """Return some rows of a column, decoded as AnnData does."""
    from anndata.io import read_elem  # slow to import, and `megacell --help` comes by here

    if is_array(node):
        if "categories" not in node.attrs:
            return _decoded(node, rows)
        categories = node.attrs["categories"]  # AnnData 0.7: a reference, for Zarr a name
        table = node.file[categories] if hasattr(node, "file") else _beside(node, categories)
        ordered = bool(table.attrs.get("ordered", False))
        check_stored(table)
        return pd.Categorical.from_codes(_decoded(node, rows), read_elem(table), ordered=ordered)
    if _encoding(node) == "categorical":
        ordered = bool(node.attrs.get("ordered", False))
        check_stored(node["categories"])
        return pd.Categorical.from_codes(_decoded(node["codes"], rows), read_elem(node["categories"]), ordered=ordered)
    if _encoding(node) in _NULLABLE:
        return _NULLABLE[_encoding(node)](_decoded(node["values"], rows), _decoded(node["mask"], rows))
    check_stored(node)
    try:
        whole = read_elem(node)
    except Exception as error:  # whatever AnnData's reader says of an encoding that it does not know
        raise ValueError(f"{node.name}: {first_line(error)}") from error
    if len(whole) < rows.stop:
        raise ValueError(f"a column of {len(whole)} rows")
    return whole[rows]


def _decoded(array: Any, rows: slice) -> Array:
    """Return entries of an array, texts as str."""
    if hasattr(array, "asstr") and (array.dtype.kind == "O" or array.dtype.kind == "S"):
        array = array.asstr()
    values = np.asarray(array[rows])
    return values.astype(object) if values.dtype.kind not in "biufc" else values


def _beside(node: Any, name: str) -> Any:
    """Return what lies in the same group of a Zarr store."""
    import zarr

    return zarr.open_group(node.store, path=node.path.rpartition("/")[0], mode="r")[name]
