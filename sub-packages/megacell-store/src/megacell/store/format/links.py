# SPDX-License-Identifier: Apache-2.0
"""No links in a store, which may have been made elsewhere: readers would read, and writers sweep, what they lead to.

The store's folder itself may be one.
"""

import os
import stat
from contextlib import suppress
from pathlib import Path

from megacell.core.errors import DataError
from megacell.core.files import TEMPORARY, list_folder

NO_LINK = "a link, and a store holds none; put what it leads to in its place, or convert again"
FOLDERS = ("shards", "neighbours")  # that hold folders of files
_FILES = ("manifest", "genes-", "panels-")  # begin the names of files beside them


def plain_size(path: Path, depth: int = 0) -> int:
    """Return the size of one of a store's files.

    Parameters
    ----------
    path : Path
    depth : int
        How many folders it lies below the store's: 0 of a manifest, 2 of a shard's file.

    Raises
    ------
    DataError
        It, or a folder between the store's and it, is a link; or it is no file.
    OSError
        It is not there.
    """
    above = os.fspath(path)
    for _ in range(depth):
        above = os.path.dirname(above)
        if stat.S_ISLNK(os.lstat(above).st_mode):
            raise DataError(f"{above}: {NO_LINK}")
    state = os.lstat(path)
    if stat.S_ISLNK(state.st_mode):
        raise DataError(f"{path}: {NO_LINK}")
    if not stat.S_ISREG(state.st_mode):
        raise DataError(f"{path}: not a plain file; restore it or convert again")
    return state.st_size


def links_in(store: Path) -> list[Path]:
    """Return the links among a store's files and folders; those of unfinished work, which is swept, left out."""
    found = [store / name for name in list_folder(store) if name in FOLDERS or name.startswith(_FILES)]
    folders = [store / name for name in FOLDERS if not (store / name).is_symlink() and (store / name).is_dir()]
    for folder in folders:
        with os.scandir(folder) as entries:
            inside = [entry for entry in entries if not entry.name.endswith(TEMPORARY)]
        found += [Path(entry.path) for entry in inside if entry.is_symlink()]
        for entry in inside:
            if entry.is_dir(follow_symlinks=False):
                with suppress(FileNotFoundError), os.scandir(entry.path) as files:  # a writer may sweep meanwhile
                    found += [Path(file.path) for file in files if file.is_symlink()]
    return sorted(path for path in found if path.is_symlink() and not path.name.endswith(TEMPORARY))


def refuse_links(store: Path) -> None:
    """Raise before a store with links is written to: writers sweep its folders.

    Raises
    ------
    DataError
        Naming the first link.
    """
    if store.is_dir() and (links := links_in(store)):
        more = f" ({len(links)} links in all)" if len(links) > 1 else ""
        raise DataError(f"{links[0]}: {NO_LINK}{more}")
