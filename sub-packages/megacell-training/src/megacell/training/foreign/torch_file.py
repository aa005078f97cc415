# SPDX-License-Identifier: Apache-2.0
"""Files that torch wrote, gone through before torch loads them: their zip, and the pickle in it."""

import io
import os
import pickle
import zipfile
from typing import IO, Any

from megacell.training.foreign.pickled import check_pickle

PICKLE = "data.pkl"  # ends the name of the part of a zip that torch unpickles
LARGEST = 1 << 26  # bytes of what torch unpickles: names, shapes and types, no weights
_MAGIC = pickle.dumps(0x1950A86A20F9469CFC6C, protocol=2)  # begins what torch before 1.6 wrote
_PICKLES = 4  # behind it: protocol, machine, the objects, the names of their storages


class Part(io.RawIOBase):
    """A part of an open file, read as if it were one of its own; ValueError for one that the file does not have."""

    def __init__(self, file: IO[bytes], offset: int, length: int) -> None:
        if not 0 <= offset <= offset + length <= file.seek(0, os.SEEK_END):
            raise ValueError(f"no bytes {offset:,} to {offset + length:,} in it")
        self._file, self._offset, self._length, self._at = file, offset, length, 0

    def seekable(self) -> bool:
        """Return True."""
        return True

    def readable(self) -> bool:
        """Return True."""
        return True

    def seek(self, at: int, whence: int = os.SEEK_SET) -> int:
        """Go to a place."""
        begin = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._length}[whence]
        self._at = max(0, begin + at)
        return self._at

    def tell(self) -> int:
        """Return the place."""
        return self._at

    def readinto(self, room: Any) -> int:
        """Read as many bytes as there are and as fit."""
        self._file.seek(self._offset + self._at)
        content = self._file.read(max(0, min(len(room), self._length - self._at)))
        room[: len(content)] = content
        self._at += len(content)
        return len(content)


def check_torch_file(file: Any) -> None:
    """Go through a file, without loading anything.

    Parameters
    ----------
    file : binary file
        Left where it was read last.

    Raises
    ------
    ValueError, zipfile.BadZipFile
        In neither of torch's formats, broken, compressed (torch never does), or with parts that overlap.
    pickle.UnpicklingError
        As `check_pickle`.
    """
    file.seek(0, os.SEEK_END)
    size = file.tell()
    file.seek(0)
    if not zipfile.is_zipfile(file):
        _check_old_format(file)
        return
    file.seek(0)
    with zipfile.ZipFile(file) as inside:
        entries = inside.infolist()
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
            raise ValueError("it is compressed, which torch never does")
        if sum(entry.file_size for entry in entries) > size:
            raise ValueError("its parts overlap, or are larger than it is")
        for entry in entries:
            if entry.filename.endswith(PICKLE):
                if entry.file_size > LARGEST:
                    raise ValueError(f"its {PICKLE} has {entry.file_size:,} bytes, which it cannot need")
                check_pickle(inside.read(entry), persistent=True)


def _check_old_format(file: Any) -> None:
    """Go through the pickles at the beginning of a file of torch before 1.6; it allocates no more than it reads."""
    file.seek(0)
    content = file.read(LARGEST)
    if not content.startswith(_MAGIC):
        raise ValueError("it is in neither of torch's formats")
    at = len(_MAGIC)
    for _ in range(_PICKLES):
        at = check_pickle(content, at, persistent=True)
