# SPDX-License-Identifier: Apache-2.0
"""A matrix of an HDF5 file, dense or sparse in either order, as blocks of rows.

Whatever the layout, a block is ``(first row, indptr int64 [rows + 1], columns int32 [nnz], values float32|float64
[nnz])``, the values in the file's order. Anonymous memory is bounded by a block, never by the matrix.
"""

import errno
import math
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import h5py

from megacell.core.errors import DataError
from megacell.store.format.blocks import ROWS, Array, Block
from megacell.store.processes.watchdog import watched

# what h5py, NumPy and the readers of compressed files raise where the bytes of a file lead them astray
_PLAIN = (OSError, EOFError, RuntimeError, LookupError, ValueError, TypeError, AttributeError)
DAMAGE = (*_PLAIN, ArithmeticError, MemoryError, AssertionError, zlib.error)
_OF_MACHINE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EMFILE, errno.ENFILE, errno.ENOMEM)


class Matrix(ABC):
    """Reads one matrix. `place` names it in messages, "FILE: raw"; `scratch` is a folder for temporary files."""

    def __init__(self, node: Any, place: str) -> None:
        self.node, self.place = node, place
        self.scratch: Path | None = None  # the system's own unless set
        self.shape: tuple[int, int] = (0, 0)
        self.sampled: tuple[Array, Array] | None = None  # what a look at some cells found, kept for the next look

    @abstractmethod
    def blocks(self, start: int, stop: int, rows: int = ROWS) -> Iterator[Block]:
        """Yield the rows from `start` up to `stop`, at most `rows` at a time."""

    @abstractmethod
    def sample(self, rows: Array) -> Block:
        """Return the given ascending rows as one block (its first row is 0)."""

    @abstractmethod
    def stored(self) -> int:
        """Return the number of values above zero, for a dense matrix about."""

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Turn what HDF5 says of a damaged file into an error that names file and place."""
        try:
            with watched():
                yield
        except DAMAGE as error:
            if is_of_machine(error):
                raise
            line = first_line(error)
            raise DataError(f"{self.place}: cannot be read ({line}); the file is damaged, fetch it again") from error


def is_of_machine(error: BaseException) -> bool:
    """True for what a full disk, or a process at its limits, says: no file that is read is to blame for it."""
    return isinstance(error, OSError) and error.errno in _OF_MACHINE


def first_line(error: BaseException) -> str:
    """Return an error's message without what follows its first line."""
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def check_complete(array: Any) -> None:
    """Raise ValueError for an array of HDF5 of which a part was never written: it would read as zeros, without a word.

    So would one whose values lie in other files, which nobody sees change; none of those is taken.
    """
    if not isinstance(array, h5py.Dataset) or not array.size:
        return
    if array.is_virtual or array.external:
        raise ValueError(f"the values of {array.name} lie in other files")
    if array.chunks:
        wanted = math.prod(-(-n // of_chunk) for n, of_chunk in zip(array.shape, array.chunks, strict=True))
        found = array.id.get_num_chunks()
    else:
        wanted, found = array.size * array.id.get_type().get_size(), array.id.get_storage_size()
    if found < wanted:
        raise ValueError(
            f"only {found:,} of {wanted:,} {'chunks' if array.chunks else 'bytes'} of {array.name} are there"
        )


def check_stored(node: Any) -> None:
    """Check all arrays at or below a node that is read whole, as `check_complete` does."""
    if hasattr(node, "shape") and hasattr(node, "dtype"):
        check_complete(node)
        return
    for name in node:
        check_stored(node[name])
