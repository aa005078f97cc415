# SPDX-License-Identifier: Apache-2.0
"""The cells' metadata: one schema for all sources, and the stored tables as columns of that schema."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from megacell.core.files import flush_file
from megacell.store.format.manifest import FileRecord, ObsColumn

INDEX = "_index"  # the column of the cells' own names
SOURCE = "source"  # added on reading; a file's own column of that name is kept as OWN_SOURCE
EMPTY = "empty"  # of a column with nothing but missing values: agrees with every kind
OWN_SOURCE = "source_in_file"
OBS_ROWS = 1 << 16  # cells whose metadata are held at once
MOST_CATEGORIES = 1 << 16  # a column with more distinct values is kept as plain text, not in the manifest
ARROW = {
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
    """Return the schema of one tidy frame; a column without any value is of the kind EMPTY, which `Schema` settles."""
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


class Schema:
    """One schema for many frames, which are added one by one: categories united in order, whole and real numbers real,
    other conflicts text.
    """

    def __init__(self, columns: Iterable[ObsColumn] = ()) -> None:
        self._known: dict[str, ObsColumn] = {}
        self._categories: dict[str, dict[str, None]] = {}  # of a column that gained some, beside what `_known` has
        self.add(columns)

    def add(self, columns: Iterable[ObsColumn]) -> None:
        """Unite with the schema of one more frame."""
        for column in columns:
            known = self._known.get(column.name)
            if known is None or (known.kind == EMPTY and column.kind != EMPTY):
                self._known[column.name] = column
            elif column.kind != EMPTY:
                self._known[column.name] = self._united(known, column)

    def columns(self) -> list[ObsColumn]:
        """Return the schema so far."""
        return [self._whole(column) for column in self._known.values()]

    def settled(self) -> list[ObsColumn]:
        """Return the schema for good: a column without any value is one of real numbers."""
        return [ObsColumn(c.name, "number") if c.kind == EMPTY else c for c in self.columns()]

    def _whole(self, column: ObsColumn) -> ObsColumn:
        categories = self._categories.get(column.name)
        return column if categories is None else replace(column, categories=tuple(categories))

    def _united(self, a: ObsColumn, b: ObsColumn) -> ObsColumn:
        kinds = {a.kind, b.kind}
        if kinds == {"category"}:
            known = self._categories.get(a.name)
            same = known is None and a.categories == b.categories
            if same and a.ordered == b.ordered:
                return a
            if known is None:
                known = self._categories[a.name] = dict.fromkeys(a.categories or ())
            known.update(dict.fromkeys(b.categories or ()))
            if len(known) <= MOST_CATEGORIES:
                return replace(a, ordered=a.ordered and b.ordered and same)
        elif len(kinds) == 1:
            return a
        self._categories.pop(a.name, None)
        return ObsColumn(a.name, "number" if kinds == {"integer", "number"} else "string")


def texts_of(values: pd.Series) -> np.ndarray[Any, Any]:
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
        return _to_pandas(pa.chunked_array([pa.nulls(table.num_rows, ARROW[column.kind])]), column)
    values = table.column(column.name)
    if pa.types.is_dictionary(values.type):
        values = values.cast(pa.string())
    if column.kind in ("category", "string"):
        values = values if pa.types.is_string(values.type) else _numbers_as_text(values)
    else:
        values = values.cast(ARROW[column.kind])
    return _to_pandas(values, column)


def _numbers_as_text(values: pa.ChunkedArray) -> pa.ChunkedArray:
    """Write numbers as an ObsWriter would have written them; each distinct one once."""
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


Array = np.ndarray[Any, Any]


class ObsWriter:
    """Writes frames of many sources as one Parquet file of the store's schema; columns that one lacks are null.

    Parameters
    ----------
    path : Path
        The file to make.
    schema : sequence of ObsColumn
    """

    def __init__(self, path: Path, schema: Sequence[ObsColumn]) -> None:
        self._path, self._columns = path, schema
        # looked up once for all sources: the categories of ten thousand of them are many
        self._categories = {
            c.name: (pd.Index(c.categories or (), dtype=object), pa.array(c.categories or (), pa.string()))
            for c in schema
            if c.kind == "category"
        }
        fields = [pa.field(INDEX, pa.string()), *(pa.field(c.name, ARROW[c.kind]) for c in schema)]
        self._schema = pa.schema(fields)
        self._writer = pq.ParquetWriter(path, self._schema, compression="zstd", use_dictionary=True)
        self._held: list[dict[str, pa.Array]] = []
        self._rows = 0

    def add(self, obs: pd.DataFrame) -> None:
        """Add a tidy frame's rows (`obs.tidy`)."""
        columns = {INDEX: pa.array(np.asarray(obs.index, object), pa.string())}
        for column in self._columns:
            if column.name in obs:
                columns[column.name] = self._to_arrow(obs[column.name], column)
            else:
                kind = pa.int32() if column.kind == "category" else ARROW[column.kind]
                columns[column.name] = pa.nulls(len(obs), kind)
        self._held.append(columns)
        self._rows += len(obs)
        if self._rows >= OBS_ROWS:
            self._write()

    def close(self) -> FileRecord:
        """Write the rest, flush to disk and return the file's record."""
        if self._rows:
            self._write()
        self._writer.close()
        flush_file(self._path)
        return FileRecord.of(self._path)

    def abandon(self) -> None:
        """Close the file as it is."""
        self._writer.close()

    def _write(self) -> None:
        joined = {}
        for field in self._schema:
            values = pa.concat_arrays([columns[field.name] for columns in self._held])
            if field.name in self._categories:
                values = pa.DictionaryArray.from_arrays(values, self._categories[field.name][1])
            joined[field.name] = values
        self._writer.write_table(pa.table(joined, schema=self._schema), row_group_size=self._rows)
        self._held, self._rows = [], 0

    def _to_arrow(self, values: pd.Series, column: ObsColumn) -> pa.Array:
        """Return a column as the schema has it, that of categories as their numbers."""
        if column.kind == "category":
            own = pd.Categorical(values)
            texts = pd.Index(list(map(str, own.categories)), dtype=object)
            numbers = self._categories[column.name][0].get_indexer(texts)
            codes = np.append(numbers, -1)[own.codes].astype(np.int32)  # code -1, of what is missing, is the last
            return pa.array(codes, pa.int32(), mask=codes < 0)
        if column.kind == "string":
            return pa.array(texts_of(values), pa.string())
        missing = np.asarray(values.isna())
        kind = {"integer": np.int64, "number": np.float64, "boolean": np.bool_}[column.kind]
        filled = values.astype(object).where(~missing, 0).astype(kind) if missing.any() else values.astype(kind)
        # a NaN among real numbers is missing, as it is for pandas
        return pa.array(np.asarray(filled), ARROW[column.kind], mask=missing)
