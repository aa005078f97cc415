# SPDX-License-Identifier: Apache-2.0
"""The cells' metadata of a shard, written as they come: those of no more than a row group are held."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from megacell.store.durable import flush_file
from megacell.store.manifest import FileRecord, ObsColumn
from megacell.store.obs import ARROW, INDEX, OBS_ROWS, texts_of

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
