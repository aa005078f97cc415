# SPDX-License-Identifier: Apache-2.0
"""Parquet tables of vocabularies, which may come from anybody: rows, types and texts are looked at first."""

from collections.abc import Mapping
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

PLAIN = ("SNAPPY", "UNCOMPRESSED")  # compressions that grow a page by 21 times at most
LONGEST = 10_000  # bytes of a text
MOST_TEXT = 1 << 28  # bytes of all texts of a column, where each value is counted
SLACK = 1 << 20  # values that any file may hold
PER_BYTE = 100  # ... and so many more for each of its bytes


def read_table(path: Path, types: Mapping[str, pa.DataType], most: int, packings: tuple[str, ...] = PLAIN) -> pa.Table:
    """Return some columns of a parquet file, without a value missing.

    Parameters
    ----------
    path : Path
    types : mapping of DataType
        What each column has to be; texts are returned coded by a dictionary.
    most : int
        Rows.
    packings : tuple of str
        Compressions that are read.

    Raises
    ------
    OSError, pa.ArrowException
        No file, or a broken one.
    ValueError
        Other columns or types, more rows or values than there can be, a text that is too long, a value that is missing.
    """
    with pq.ParquetFile(path) as file:
        _check_sizes(file.metadata, path, most, packings)
        schema = file.schema_arrow
    coded = [name for name, kind in types.items() if kind == pa.string()]
    for name, kind in types.items():
        found = schema.field(name).type if name in schema.names else None
        plain = found.value_type if name in coded and isinstance(found, pa.DictionaryType) else found
        if plain != kind:
            raise ValueError(f"{path.name}: column {name} holds {found}, not {kind}")
    with pq.ParquetFile(path, read_dictionary=coded) as file:
        table = file.read(columns=list(types))
    for name in types:
        if table.column(name).null_count:
            raise ValueError(f"{path.name}: column {name} lacks values")
        if name in coded:
            _check_texts(table.column(name), f"{path.name}: column {name}")
    return table


def _check_sizes(metadata: pq.FileMetaData, path: Path, most: int, packings: tuple[str, ...]) -> None:
    """Raise ValueError for more rows or values than there can be: a few bytes may stand for any number of them."""
    groups = [metadata.row_group(number) for number in range(metadata.num_row_groups)]
    rows = max(metadata.num_rows, sum(group.num_rows for group in groups))
    if rows > most:
        raise ValueError(f"{path.name}: {rows:,} rows, {most:,} at most are read")
    values: dict[int, int] = {}
    for group in groups:
        for number in range(group.num_columns):
            column = group.column(number)
            if column.compression not in packings:
                raise ValueError(f"{path.name}: compressed by {column.compression}, not {' or '.join(packings)}")
            values[number] = values.get(number, 0) + column.num_values
    if (found := max(values.values(), default=0)) > SLACK + PER_BYTE * path.stat().st_size:
        raise ValueError(f"{path.name}: {found:,} values, more than a file of its size can hold")


def _check_texts(column: pa.ChunkedArray, place: str) -> None:
    """Raise ValueError for texts that are too long, each or all together; they are still coded by a dictionary."""
    total = 0
    for chunk in column.chunks:
        if not isinstance(chunk, pa.DictionaryArray):
            chunk = chunk.dictionary_encode()
        lengths = pc.binary_length(chunk.dictionary)
        if (pc.max(lengths).as_py() or 0) > LONGEST:
            raise ValueError(f"{place} holds a text of more than {LONGEST:,} bytes")
        total += pc.sum(pc.take(lengths, chunk.indices)).as_py() or 0
    if total > MOST_TEXT:
        raise ValueError(f"{place} holds {total:,} bytes of text, {MOST_TEXT:,} at most are read")


def texts(column: pa.ChunkedArray) -> pa.Array:
    """Return a column of texts as it stands, no longer coded."""
    whole = column.combine_chunks()
    if isinstance(whole, pa.ChunkedArray):
        whole = pa.concat_arrays([chunk.cast(pa.string()) for chunk in whole.chunks])
    return whole.cast(pa.string())
