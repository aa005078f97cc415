# SPDX-License-Identifier: Apache-2.0
"""Whether every file of a store is still what was written: sizes and XXH3 against the manifest."""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from megacell.core.errors import DataError
from megacell.core.files import hash_file
from megacell.store.format.links import FOLDERS, NO_LINK, links_in, plain_size
from megacell.store.format.manifest import NAME, FileRecord, Manifest, generation_name
from megacell.store.processes.executors import cores


@dataclass(frozen=True)
class Verification:
    """What was looked at, and every damage found: one line each, naming the file."""

    files: int
    bytes: int
    damages: list[str]


def verify(
    path: str | os.PathLike[str],
    begin: Callable[[int], None] = lambda _bytes: None,
    advance: Callable[[int], None] = lambda _bytes: None,
) -> Verification:
    """Read every file of a store, of all generations that can still be opened.

    Parameters
    ----------
    path : path-like
        The store.
    begin : callable
        Receives the bytes of all files before any is read.
    advance : callable
        Receives the bytes of each file when it is done.

    Raises
    ------
    DataError
        The manifest itself cannot be read, so nothing else can be judged.
    """
    store = Path(path)
    manifest = Manifest.open(store)
    damages = [f"{link}: {NO_LINK}" for link in links_in(store)]
    kept = store / generation_name(manifest.generation)
    if kept.is_symlink():
        pass  # said above
    elif not kept.is_file():
        damages.append(f"{kept}: missing; copy {NAME} to it")
    elif kept.read_bytes() != (store / NAME).read_bytes():
        damages.append(f"{kept}: differs from {NAME}; copy {NAME} over it")
    files = dict(manifest.all_files())
    for name in manifest.earlier:
        try:
            if os.path.lexists(store / name):
                files |= Manifest.read(store, name).own_files()  # else said below, with the other files
        except DataError as error:
            if not (store / name).is_symlink():
                damages.append(str(error))
    begin(sum(record.bytes for record in files.values()))
    with ThreadPoolExecutor(cores()) as pool:  # reading and hashing let go of Python's lock
        for (name, record), damage in zip(files.items(), pool.map(partial(_look, store), files.items()), strict=True):
            if damage and not _behind_link(store, name):
                damages.append(f"{store / name}: {damage}; restore it from a copy or convert again")
            advance(record.bytes)
    return Verification(len(files) + 2, sum(record.bytes for record in files.values()), damages)


def _look(store: Path, file: tuple[str, FileRecord]) -> str:
    return damage_of(store / file[0], file[1])


def _behind_link(store: Path, name: str) -> bool:
    """True if a file, or a folder that it lies in, is a link, which is said already."""
    parts = Path(name).parts
    return any(store.joinpath(*parts[: i + 1]).is_symlink() for i in range(len(parts)))


def damage_of(path: Path, record: FileRecord) -> str:
    """Say what is wrong with a file, "" if nothing is."""
    try:
        size = plain_size(path, 2 if path.parent.parent.name in FOLDERS else 0)
        if size != record.bytes:
            return f"{size:,} bytes, should be {record.bytes:,}"
        found = hash_file(path)
    except FileNotFoundError:
        return "missing"
    except DataError:
        return "a link, or no plain file"
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    return "" if found == record.xxh3 else f"damaged (XXH3 {found}, should be {record.xxh3})"
