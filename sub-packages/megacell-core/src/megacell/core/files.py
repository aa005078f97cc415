# SPDX-License-Identifier: Apache-2.0
"""Files that are either whole on disk or not there: hashing, flushing, renaming."""

import contextlib
import os
import secrets
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import xxhash

from megacell.core.errors import DataError

HASHED_AT_ONCE = 1 << 22  # bytes; large enough that the calls cost nothing beside the hash
TEMPORARY = ".tmp"  # ends the name of everything that is not yet whole
_FOLDER_ITSELF = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC  # not what a link of its name leads to


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


def remove_tree(root: Path, name: str) -> None:
    """Remove what lies at ``root/name``, if anything: a file, a link (never what it leads to), a folder with all in it.

    The one way in which Megacell removes folders: what is removed lies below a folder that is held open, so neither a
    link that was there before nor one that is put there meanwhile leads anywhere else.

    Parameters
    ----------
    root : Path
        A folder that the user named (a store, a run, the folder of an output). It alone may be a link itself.
    name : str
        Below it, such as ``step-00000012`` or ``shards/00003``.

    Raises
    ------
    DataError
        A folder between `root` and the last part of `name` is a link, or no folder.
    OSError
        Something cannot be removed.
    """
    *parents, last = Path(name).parts
    if os.pardir in (*parents, last) or Path(name).is_absolute():
        raise ValueError(f"{name} is not below {root}")
    with contextlib.suppress(FileNotFoundError), open_folder(root, *parents) as folder:
        if not stat.S_ISDIR(os.stat(last, dir_fd=folder, follow_symlinks=False).st_mode):
            os.unlink(last, dir_fd=folder)
            return
        own = os.open(last, _FOLDER_ITSELF, dir_fd=folder)
        try:
            _empty(own)
        finally:
            os.close(own)
        os.rmdir(last, dir_fd=folder)


def list_folder(root: Path, name: str = "") -> list[str]:
    """Return the names in the folder ``root/name``, sorted; none where there is no folder.

    Parameters
    ----------
    root, name
        As for `remove_tree`.

    Raises
    ------
    DataError
        A folder between `root` and the end of `name` is a link, or no folder.
    """
    try:
        with open_folder(root, *Path(name).parts) as folder:
            return sorted(os.listdir(folder))
    except FileNotFoundError:
        return []


@contextlib.contextmanager
def open_folder(root: Path, *parts: str) -> Iterator[int]:
    """Give the descriptor of a folder below one that the user named, which alone may be a link.

    Raises
    ------
    DataError
        One of the parts is a link, or no folder.
    """
    path, folder = root, os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        for part in parts:
            path, outer = path / part, folder
            try:
                folder = os.open(part, _FOLDER_ITSELF, dir_fd=outer)
            except NotADirectoryError:
                what = "a link" if path.is_symlink() else "no folder"
                raise DataError(f"{path}: is {what}; move it away") from None
            os.close(outer)
        yield folder
    finally:
        os.close(folder)


def _empty(folder: int) -> None:
    """Remove all that a folder holds; folders within are taken apart here, so no depth needs more descriptors."""
    while names := os.listdir(folder):
        for name in names:
            if not stat.S_ISDIR(os.stat(name, dir_fd=folder, follow_symlinks=False).st_mode):
                os.unlink(name, dir_fd=folder)
                continue
            inner = os.open(name, _FOLDER_ITSELF, dir_fd=folder)
            try:
                for within in os.listdir(inner):
                    if stat.S_ISDIR(os.stat(within, dir_fd=inner, follow_symlinks=False).st_mode):
                        os.rename(within, secrets.token_hex(16), src_dir_fd=inner, dst_dir_fd=folder)
                    else:
                        os.unlink(within, dir_fd=inner)
            finally:
                os.close(inner)
            os.rmdir(name, dir_fd=folder)
