# SPDX-License-Identifier: Apache-2.0
"""Opening a store's tables, of which a few bytes may stand for any number of rows: they are looked at first."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from megacell.core.errors import DataError
from megacell.store.format.links import plain_size

# what pyarrow and Python raise where a table is not what it should be
NO_TABLE = (OSError, KeyError, IndexError, ValueError, TypeError, AttributeError, MemoryError, pa.ArrowException)


@contextmanager
def open_table(
    path: Path, depth: int = 0, rows: int | None = None, as_codes: Sequence[str] = ()
) -> Iterator[pq.ParquetFile]:
    """Give one of a store's tables, opened, of as many rows as it has to have.

    Parameters
    ----------
    path, depth
        As for `plain_size`.
    rows : int, optional
        How many it has to have.
    as_codes : sequence of str
        Columns of text to be read as codes into their distinct values.

    Raises
    ------
    DataError
        A link, another number of rows, or what is no table; also for what is raised while it is open.
    """
    try:
        plain_size(path, depth)
        with pq.ParquetFile(path, read_dictionary=list(as_codes)) as file:
            if rows is not None and file.metadata.num_rows != rows:
                raise ValueError(f"{file.metadata.num_rows:,} rows, the manifest says {rows:,}")
            yield file
    except NO_TABLE as error:
        line = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(f"{path}: cannot be read ({line}); restore it or convert again") from None
