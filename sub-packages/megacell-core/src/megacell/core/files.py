# SPDX-License-Identifier: Apache-2.0
"""Files that are either whole on disk or not there: hashing, flushing, renaming."""

import contextlib
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import xxhash

HASHED_AT_ONCE = 1 << 22  # bytes; large enough that the calls cost nothing beside the hash
TEMPORARY = ".tmp"  # ends the name of everything that is not yet whole


def hash_file(path: Path) -> str:
    """Return the XXH3-64 (seed 0) of a file's bytes as 16 lower-case hexadecimal digits."""
    digest = xxhash.xxh3_64()
    with open(path, "rb", buffering=0) as file:
        while chunk := file.read(HASHED_AT_ONCE):
            digest.update(chunk)
    return digest.hexdigest()


def hash_source(path: Path) -> str:
    """Return the hash of a file, or of a folder: that of its files' paths within it and hashes, in order."""
    if not path.is_dir():
        return hash_file(path)
    digest = xxhash.xxh3_64()
    for file in sorted(path.rglob("*")):
        if file.is_file():
            digest.update(f"{file.relative_to(path).as_posix()} {hash_file(file)}\n".encode())
    return digest.hexdigest()


def flush_file(path: Path) -> None:
    """Wait until a file's bytes are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def flush_directory(path: Path) -> None:
    """Wait until a directory's entries (new names, renames) are on the disk."""
    flush_file(path)


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """Give an open file to write, which takes its name when it is whole and flushed; after an error there is none.

    Its name shows, at any moment and after any crash, the old bytes or the new ones. Several processes may write the
    same bytes under one name at once: each has a temporary file of its own.
    """
    temporary = path.with_name(f"{path.name}-{secrets.token_hex(4)}{TEMPORARY}")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        move_into_place(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


def write_whole(path: Path, content: bytes) -> None:
    """Write a file that shows the old bytes or the new ones at any moment, as `whole_file` does."""
    with whole_file(path) as file:
        file.write(content)


def move_into_place(temporary: Path, path: Path) -> None:
    """Rename a flushed file, or a directory of flushed files, to its final name and flush the parent."""
    if temporary.is_dir():
        flush_directory(temporary)
    os.replace(temporary, path)
    flush_directory(path.parent)
