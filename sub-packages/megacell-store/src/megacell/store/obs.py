# SPDX-License-Identifier: Apache-2.0
"""The cells' metadata: one schema for all sources, and each source's frame as a table of that schema."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from megacell.store.manifest import ObsColumn

INDEX = "_index"  # the column of the cells' own names
SOURCE = "source"  # added on reading; a file's own column of that name is kept as OWN_SOURCE
EMPTY = "empty"  # of a column with nothing but missing values: agrees with every kind
OWN_SOURCE = "source_in_file"
MOST_CATEGORIES = 1 << 16  # a column with more distinct values is kept as plain text, not in the manifest
_ARROW = {
    "category": pa.dictionary(pa.int32(), pa.string()),
    "string": pa.string(),
    "integer": pa.int64(),
    "number": pa.float64(),
    "boolean": pa.bool_(),
}
_PANDAS = {"integer": ("int64", "Int64"), "boolean": ("bool", "boolean")}  # without and with missing values


def tidy(obs: pd.DataFrame) -> pd.DataFrame:
    """Return a file's obs with text column names, none of them one of ours or twice there."""
    obs = obs.copy(deep=False)
    obs.index = obs.index.astype(str)
    ours = {SOURCE: OWN_SOURCE, INDEX: f"{INDEX}_in_file"}
    obs.columns = [ours.get(str(c), str(c)) for c in obs.columns]
    return obs.loc[:, ~obs.columns.duplicated()]


def describe(obs: pd.DataFrame) -> list[ObsColumn]:
    """Return the schema of one tidy frame; a column without any value is of the kind EMPTY, which `unite` settles."""
    return [_describe(str(name), obs[name]) for name in obs.columns]


def _describe(name: str, column: pd.Series) -> ObsColumn:
    dtype = column.dtype
    if isinstance(dtype, pd.CategoricalDtype):
        categories = tuple(dict.fromkeys(map(str, dtype.categories)))
        if len(categories) <= MOST_CATEGORIES:
            return ObsColumn(name, "category", categories, bool(dtype.ordered))
        return ObsColumn(name, "string")
    if len(column) and column.isna().all():
        return ObsColumn(name, EMPTY)
    if pd.api.types.is_bool_dtype(dtype):
        return ObsColumn(name, "boolean")
    if pd.api.types.is_integer_dtype(dtype):
        fits = not pd.api.types.is_unsigned_integer_dtype(dtype) or not len(column) or column.max() < 1 << 63
        return ObsColumn(name, "integer" if fits else "string")
    if pd.api.types.is_float_dtype(dtype):
        return ObsColumn(name, "number")
    present = column.dropna()
    if len(present) and all(isinstance(value, bool | np.bool_) for value in present):
        return ObsColumn(name, "boolean")
    return ObsColumn(name, "string")


def unite(schemas: Sequence[Sequence[ObsColumn]], *, settle: bool = True) -> list[ObsColumn]:
    """Return one schema for several: categories united in order, whole and real numbers real, other conflicts text.

    Unless more schemas will follow (`settle` False), a column without any value becomes one of real numbers.
    """
    united: dict[str, ObsColumn] = {}
    for column in (column for schema in schemas for column in schema):
        known = united.get(column.name)
        united[column.name] = column if known is None else _unite(known, column)
    return [ObsColumn(c.name, "number") if settle and c.kind == EMPTY else c for c in united.values()]


def _unite(a: ObsColumn, b: ObsColumn) -> ObsColumn:
    kinds = {a.kind, b.kind}
    if kinds == {"category"}:
        if a.categories == b.categories and a.ordered == b.ordered:
            return a
        categories = tuple(dict.fromkeys((a.categories or ()) + (b.categories or ())))
        if len(categories) <= MOST_CATEGORIES:
            return ObsColumn(a.name, "category", categories, a.ordered and b.ordered and a.categories == b.categories)
        return ObsColumn(a.name, "string")
    if EMPTY in kinds:
        return b if a.kind == EMPTY else a
    if len(kinds) == 1:
        return a
    return ObsColumn(a.name, "number" if kinds == {"integer", "number"} else "string")


def to_table(obs: pd.DataFrame, schema: Sequence[ObsColumn]) -> pa.Table:
    """Return a tidy frame's columns and index as an Arrow table of the schema; absent columns are null."""
    columns = {INDEX: pa.array(np.asarray(obs.index, object), pa.string())}
    for column in schema:
        if column.name in obs:
            columns[column.name] = _to_arrow(obs[column.name], column)
        else:
            columns[column.name] = pa.nulls(len(obs), _ARROW[column.kind])
    return pa.table(columns)


def _to_arrow(values: pd.Series, column: ObsColumn) -> pa.Array:
    if column.kind == "category":
        numbers = pd.Index(column.categories or (), dtype=object)
        own = pd.Categorical(values)
        texts = pd.Index(list(map(str, own.categories)), dtype=object)
        number_of = np.append(numbers.get_indexer(texts), -1)  # code -1, of what is missing, is the last
        codes = number_of[own.codes].astype(np.int32)
        indices = pa.array(codes, pa.int32(), mask=codes < 0)
        return pa.DictionaryArray.from_arrays(indices, pa.array(column.categories, pa.string()))
    if column.kind == "string":
        return pa.array(_texts(values), pa.string())
    missing = np.asarray(values.isna())
    kind = {"integer": np.int64, "number": np.float64, "boolean": np.bool_}[column.kind]
    filled = values.astype(object).where(~missing, 0).astype(kind) if missing.any() else values.astype(kind)
    # a NaN among real numbers is missing, as it is for pandas
    return pa.array(np.asarray(filled), _ARROW[column.kind], mask=missing)


def _texts(values: pd.Series) -> np.ndarray[Any, Any]:
    """Return text, None where missing."""
    own = pd.Categorical(values.astype(object).map(_text, na_action="ignore"))
    texts = np.full(len(own.categories) + 1, None, object)  # code -1, of what is missing, is the last
    texts[:-1] = own.categories
    return np.asarray(texts[own.codes])


def _text(value: object) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)


def from_table(table: pa.Table, column: ObsColumn) -> pd.Series:
    """Return one column of the shards' tables, joined, as the store's schema has it.

    A shard written before a column was united with others may hold another type: it is cast here.
    """
    if column.name not in table.column_names:
        return _to_pandas(pa.chunked_array([pa.nulls(table.num_rows, _ARROW[column.kind])]), column)
    values = table.column(column.name)
    if pa.types.is_dictionary(values.type):
        values = values.cast(pa.string())
    if column.kind in ("category", "string"):
        values = values if pa.types.is_string(values.type) else _numbers_as_text(values)
    else:
        values = values.cast(_ARROW[column.kind])
    return _to_pandas(values, column)


def _numbers_as_text(values: pa.ChunkedArray) -> pa.ChunkedArray:
    """Write numbers as `to_table` would have written them; each distinct one once."""
    codes = values.combine_chunks().dictionary_encode()
    text = pa.array([str(value) for value in codes.dictionary.to_pylist()], pa.string())
    return pa.chunked_array([pa.DictionaryArray.from_arrays(codes.indices, text).cast(pa.string())])


def _to_pandas(values: pa.ChunkedArray, column: ObsColumn) -> pd.Series:
    if column.kind == "category":
        categories = list(column.categories or ())
        codes = pc.index_in(values, pa.array(categories, pa.string())).fill_null(-1).to_numpy()
        dtype = pd.CategoricalDtype(pd.Index(categories, dtype=object), column.ordered)
        return pd.Series(pd.Categorical.from_codes(codes.astype(np.int64), dtype=dtype))
    if column.kind in _PANDAS:
        plain, nullable = _PANDAS[column.kind]
        if values.null_count == 0:
            return pd.Series(np.asarray(values.to_numpy()), dtype=plain)
        return pd.Series(pd.array(values.to_pylist(), dtype=nullable))
    return pd.Series(values.to_pandas())
