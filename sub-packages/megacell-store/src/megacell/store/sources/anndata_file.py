# SPDX-License-Identifier: Apache-2.0
"""AnnData's own files: .h5ad of every version from 0.7 on, the RNA of an .h5mu, and Zarr stores (v2 and v3)."""

import json
import os
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import h5py
import pandas as pd

from megacell.core.errors import DataError
from megacell.store.processes.watchdog import watched
from megacell.store.sources.container import Container, is_array
from megacell.store.sources.layouts import open_matrix
from megacell.store.sources.matrix import DAMAGE, Matrix, check_complete, first_line, is_of_machine
from megacell.store.sources.table import Frame

_ZARR_METADATA = (".zarray", ".zmetadata", "zarr.json")
_LARGEST_METADATA = 64 << 20  # bytes; that of a whole store, gathered, holds all its arrays'
# of numcodecs and Zarr, those that compute and nothing else: pickle is not among them, nor what makes objects of JSON
CODECS = {
    *("blosc", "bz2", "gzip", "lz4", "lzma", "zlib", "zstd", "zfpy", "pcodec"),
    *("bytes", "transpose", "sharding_indexed", "vlen-utf8", "vlen-bytes", "base64", "packbits"),
    *("crc32", "crc32c", "adler32", "fletcher32", "jenkins_lookup3"),
    *("shuffle", "delta", "bitround", "quantize", "fixedscaleoffset", "astype"),
}


class AnnDataFile(Container):
    """A group of HDF5 or Zarr that holds obs, var, X, raw, layers; `file` is closed with it."""

    def __init__(self, path: Path, group: Any, form: str, file: Any = None) -> None:
        self.group, self.format, self._file = group, form, file
        for name in ("obs", "var"):
            if name not in group:
                raise DataError(f"{path}: has no {name}, so it is no .{form} file; give one that AnnData wrote")
        uns = _texts(group["uns"]) if "uns" in group else {}
        self._obs = Frame(group, "obs", path)
        super().__init__(path, len(self._obs), Frame(group, "var", path).read(), uns)

    @property
    def obs_columns(self) -> list[str]:
        return self._obs.columns

    def obs(self, start: int, stop: int, names: Collection[str] | None = None) -> pd.DataFrame:
        return self._obs.read(start, stop, names)

    def matrices(self) -> list[str]:
        group = self.group
        names = [f"layer:{name}" for name in group["layers"]] if "layers" in group else []
        names += ["raw"] if "raw" in group and "X" in group["raw"] else []
        return names + (["X"] if "X" in group and group["X"].attrs.get("encoding-type") != "null" else [])

    def columns(self, name: str) -> int:
        node = self._node(name)
        shape = node.shape if is_array(node) else node.attrs.get("shape", (0, 0))
        return int(shape[-1]) if not name.startswith("layer:") else -1

    def matrix(self, name: str) -> tuple[Matrix, pd.DataFrame]:
        own = self.var
        if name == "raw" and "var" in self.group["raw"]:
            own = Frame(self.group, "raw/var", self.path).read()
        return open_matrix(self._node(name), f"{self.path}: {name}", self.n_cells, len(own)), own

    def graph_names(self) -> list[str]:
        return [str(name) for name in self.group["obsp"]] if "obsp" in self.group else []

    def graphs(self, names: Sequence[str]) -> dict[str, Matrix]:
        here = [name for name in names if name in self.graph_names()]
        return {name: open_matrix(self.group["obsp"][name], f"{self.path}: obsp/{name}") for name in here}

    def close(self) -> None:
        if self._file is not None:
            self._file.close()

    def _node(self, name: str) -> Any:
        if name == "raw":
            return self.group["raw/X"]
        return self.group["X"] if name == "X" else self.group["layers"][name.removeprefix("layer:")]


def open_h5(path: Path) -> h5py.File:
    """Open an HDF5 file for reading; one with links is refused, which would bring in what lies in other files.

    Raises
    ------
    DataError
        Not HDF5, damaged, or with links.
    """
    try:
        file = h5py.File(path, "r", locking=False)
    except OSError as error:
        if is_of_machine(error):
            raise
        what = "is empty" if path.stat().st_size == 0 else "is not an HDF5 file, or is truncated"
        raise DataError(f"{path}: {what} ({first_line(error)}); fetch it again") from None
    try:
        refuse_links(file, path)
    except BaseException:
        file.close()
        raise
    return file


def refuse_links(file: h5py.File, path: Path) -> None:
    """Raise for a link that leads to another file or group: AnnData writes none, and what lies there is not the file's.

    Parameters
    ----------
    file : File
    path : Path
        For messages.

    Raises
    ------
    DataError
        Naming the link.
    """
    links = file.id.links

    def look(name: bytes, info: Any) -> str | None:
        if info.type == h5py.h5l.TYPE_HARD:
            return None
        shown = name.decode(errors="replace")
        if info.type == h5py.h5l.TYPE_EXTERNAL:
            return f"{shown} is a link to the file {os.fsdecode(links.get_val(name)[0])}"
        if info.type != h5py.h5l.TYPE_SOFT:
            return f"{shown} is a link of an unknown kind"
        target = links.get_val(name).decode(errors="replace")
        return f"{shown} is a link to {target}" if "/" in target or target in ("", ".", "..") else None

    try:
        with watched():
            found = links.visit(look, info=True)
    except DAMAGE as error:
        raise DataError(f"{path}: cannot be read ({first_line(error)}); the file is damaged, fetch it again") from error
    if found is not None:
        raise DataError(f"{path}: {found}; write the file anew with all that belongs to it, as AnnData does")


def refuse_stored_elsewhere(file: h5py.File, path: Path, groups: Sequence[str]) -> None:
    """Raise for an array in one of some groups whose values lie in other files.

    Raises
    ------
    DataError
        Naming the array.
    """

    def look(_name: str, node: Any) -> str | None:
        elsewhere = isinstance(node, h5py.Dataset) and (node.is_virtual or node.external)
        return str(node.name) if elsewhere else None

    for group in groups:
        node = file.get(group)
        found = node.visititems(look) if isinstance(node, h5py.Group) else node is not None and look("", node)
        if found:
            raise DataError(f"{path}: the values of {found} lie in other files; write the file anew with all of it")


def open_h5mu(path: Path) -> AnnDataFile:
    """Open the RNA of a multimodal file."""
    file = open_h5(path)
    modalities = list(file["mod"]) if "mod" in file else []
    if "rna" not in modalities:
        file.close()
        raise DataError(f"{path}: has no mod/rna (modalities: {', '.join(modalities) or 'none'}); give a file with RNA")
    return AnnDataFile(path, file["mod/rna"], "h5mu", file)


def open_zarr(path: Path) -> AnnDataFile:
    """Open an AnnData store of Zarr version 2 or 3."""
    import zarr

    _check_zarr(path)
    try:
        group = zarr.open_group(str(path), mode="r")
    except Exception as error:  # whatever Zarr says of what is no store of its
        raise DataError(f"{path}: is not a Zarr group ({first_line(error)}); give one that AnnData wrote") from None
    return AnnDataFile(path, group, "zarr")


def _check_zarr(path: Path) -> None:
    """Look at all of a Zarr store before Zarr does: no links, and no codec but those that only compute.

    numcodecs has one that unpickles, which is to run what a file says.
    """
    folders = [str(path)]
    while folders:
        with os.scandir(folders.pop()) as entries:
            for entry in entries:
                if entry.is_symlink():
                    raise DataError(f"{entry.path}: is a link; copy the store with what its links lead to")
                if entry.is_dir(follow_symlinks=False):
                    folders.append(entry.path)
                elif entry.name in _ZARR_METADATA:
                    _check_codecs(Path(entry.path))


def _check_codecs(path: Path) -> None:
    try:
        if path.stat().st_size > _LARGEST_METADATA:
            raise ValueError(f"over {_LARGEST_METADATA >> 20} MiB")
        unknown = sorted(set(_codecs(json.loads(path.read_bytes()))) - CODECS)
    except (OSError, ValueError, TypeError, RecursionError, AttributeError) as error:
        raise DataError(f"{path}: cannot be read ({first_line(error)}); the store is damaged, fetch it again") from None
    if unknown:
        fix = "write the store anew with AnnData's own compression"
        raise DataError(f"{path}: its codec {unknown[0][:80]!r} is not one that Megacell reads; {fix}")


def _codecs(content: Any) -> Iterator[str]:
    """Yield the names of all codecs in the metadata of an array, or of a whole store; version 2 or 3."""
    if isinstance(content, list):
        for each in content:
            yield from _codecs(each)
    elif isinstance(content, dict):
        for key, value in content.items():
            if key == "attributes" or key.endswith(".zattrs"):
                continue
            if key in ("compressor", "filters", "codecs", "index_codecs"):
                for each in value if isinstance(value, list) else [value] if value is not None else []:
                    name = each if isinstance(each, str) else str(each.get("id", each.get("name", "")))
                    yield name.removeprefix("numcodecs.").removeprefix("numcodecs/")
            yield from _codecs(value)


def _texts(uns: Any) -> dict[str, str]:
    texts = {}
    for key in uns:
        node = uns[key]
        if is_array(node) and node.shape == () and node.dtype.kind in "OUST":
            check_complete(node)
            value = node[()]
            texts[str(key)] = value.decode(errors="replace") if isinstance(value, bytes) else str(value)
    return texts
