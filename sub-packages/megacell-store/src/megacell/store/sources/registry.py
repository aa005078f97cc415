# SPDX-License-Identifier: Apache-2.0
"""Which files and folders are sources, and of which format each is."""

import os
from collections.abc import Callable, Iterable
from pathlib import Path

from megacell.core.errors import DataError, UsageError
from megacell.store.sources.anndata_file import AnnDataFile, open_h5, open_h5mu, open_zarr
from megacell.store.sources.container import Container
from megacell.store.sources.loom import Loom
from megacell.store.sources.scdl import ScdlBlock, is_scdl
from megacell.store.sources.tenx import TenxFolder, TenxH5

SUFFIXES: dict[str, Callable[[Path], Container]] = {
    ".h5ad": lambda path: AnnDataFile(path, file := open_h5(path), "h5ad", file),
    ".h5mu": open_h5mu,
    ".loom": Loom,
    ".h5": TenxH5,
}


def open_container(path: Path, block: int = 0) -> Container:
    """Open one source by what it is: a folder by what is in it, a file by its suffix; .h5ad where that says nothing.

    Raises
    ------
    DataError
        A folder that is no source, or a file that is damaged.
    """
    if path.is_dir():
        if is_zarr(path):
            return open_zarr(path)
        if is_tenx(path):
            return TenxFolder(path)
        if is_scdl(path):
            return ScdlBlock(path, block)
        raise DataError(
            f"{path}: neither a Zarr store, a folder of Cell Ranger nor an archive of bionemo-scdl; name one"
        )
    return SUFFIXES.get(path.suffix.lower(), SUFFIXES[".h5ad"])(path)


def is_zarr(folder: Path) -> bool:
    """True if a folder is a Zarr group of version 2 or 3."""
    return (folder / ".zgroup").is_file() or (folder / "zarr.json").is_file()


def is_tenx(folder: Path) -> bool:
    """True if a folder holds a 10x matrix."""
    return (folder / "matrix.mtx").is_file() or (folder / "matrix.mtx.gz").is_file()


def find_sources(sources: str | os.PathLike[str] | Iterable[str | os.PathLike[str]]) -> list[Path]:
    """Return the sources that paths and folders name, each once, folders' by name.

    Raises
    ------
    UsageError
        A path that is not there, or nothing found.
    """
    given = [sources] if isinstance(sources, str | os.PathLike) else list(sources)
    found: dict[Path, Path] = {}
    for path in map(Path, given):
        if path.is_dir():
            inside = sorted(_inside(path, set()))
            if not inside:
                raise UsageError(
                    f"{path}: no source in this folder ({', '.join(SUFFIXES)}, .zarr, 10x .mtx); name another"
                )
        elif path.exists():
            inside = [path]
        else:
            raise UsageError(f"{path}: no such file or folder; check the path")
        for file in inside:
            found.setdefault(file.resolve(), file)
    if not found:
        raise UsageError(f"no sources given; name {', '.join(SUFFIXES)} files or folders that hold some")
    return list(found.values())


def _inside(folder: Path, seen: set[tuple[int, int]]) -> list[Path]:
    """Return a folder that is itself a source, or the sources below it, never what lies within a Zarr store.

    `seen` holds the folders that were looked into: links may lead back to them.
    """
    state = folder.stat()
    if (state.st_dev, state.st_ino) in seen:
        return []
    seen.add((state.st_dev, state.st_ino))
    if is_zarr(folder) or is_tenx(folder) or is_scdl(folder):
        return [folder]
    found = []
    for entry in sorted(folder.iterdir()):
        if entry.name.startswith("."):
            continue
        if entry.is_dir():
            found += _inside(entry, seen)
        elif entry.suffix.lower() in SUFFIXES and entry.is_file():
            found.append(entry)
    return found
