# SPDX-License-Identifier: Apache-2.0
"""Arrow's stream files, which may come from anybody, mapped and never unpacked."""

import struct
from pathlib import Path

import pyarrow as pa

SCHEMA, DICTIONARY, BATCH = 1, 2, 3  # kinds of a message, in Arrow's Message.fbs
_COMPRESSION = 3  # field of a RecordBatch
_DATA = 1  # field of a DictionaryBatch: a RecordBatch


def open_stream(path: Path) -> pa.Table:
    """Map a stream file.

    Returns
    -------
    Table
        Over the mapped file; what lies in its columns has not been looked at.

    Raises
    ------
    OSError, pa.ArrowException
        No stream, or a broken one.
    ValueError
        It is compressed: reading it would take memory out of proportion, and `datasets` compresses none.
    """
    with pa.memory_map(str(path)) as file:
        for message in pa.ipc.MessageReader.open_stream(file):
            _refuse_compressed(message.metadata.to_pybytes())
    return pa.ipc.open_stream(pa.memory_map(str(path))).read_all()


def _refuse_compressed(metadata: bytes) -> None:
    """Raise ValueError for the metadata (a flatbuffer) of a message whose body is compressed."""
    try:
        message = _follow(metadata, 0)
        kind = _field(metadata, message, 1)
        header = _field(metadata, message, 2)
        if kind is None or header is None or metadata[kind] == SCHEMA:
            return
        batch = _follow(metadata, header)
        if metadata[kind] == DICTIONARY:
            data = _field(metadata, batch, _DATA)
            batch = batch if data is None else _follow(metadata, data)
        if _field(metadata, batch, _COMPRESSION) is not None:
            raise ValueError("it is compressed, which `datasets` never does")
    except (struct.error, IndexError):
        raise ValueError("a message in it is broken") from None


def _follow(buffer: bytes, at: int) -> int:
    """Return the place that an offset at a place leads to."""
    return at + int(struct.unpack_from("<I", buffer, at)[0])


def _field(buffer: bytes, table: int, number: int) -> int | None:
    """Return the place of a table's field, None where it has none."""
    about = table - struct.unpack_from("<i", buffer, table)[0]
    if about < 0:
        raise IndexError
    if 4 + 2 * number >= struct.unpack_from("<H", buffer, about)[0]:
        return None
    offset = struct.unpack_from("<H", buffer, about + 4 + 2 * number)[0]
    return table + int(offset) if offset else None
