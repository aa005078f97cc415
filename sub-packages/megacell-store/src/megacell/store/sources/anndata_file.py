# SPDX-License-Identifier: Apache-2.0
"""AnnData's own files: .h5ad of every version from 0.7 on, the RNA of an .h5mu, and Zarr stores (v2 and v3)."""

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import h5py
import pandas as pd

from megacell.core.errors import DataError
from megacell.store.sources.container import Container, is_array
from megacell.store.sources.layouts import open_matrix
from megacell.store.sources.matrix import Matrix, first_line
from megacell.store.sources.table import Frame


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
    """Open an HDF5 file for reading."""
    try:
        return h5py.File(path, "r", locking=False)
    except OSError as error:
        what = "is empty" if path.stat().st_size == 0 else "is not an HDF5 file, or is truncated"
        raise DataError(f"{path}: {what} ({first_line(error)}); fetch it again") from None


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

    try:
        group = zarr.open_group(str(path), mode="r")
    except Exception as error:  # whatever Zarr says of what is no store of its
        raise DataError(f"{path}: is not a Zarr group ({first_line(error)}); give one that AnnData wrote") from None
    return AnnDataFile(path, group, "zarr")


def _texts(uns: Any) -> dict[str, str]:
    texts = {}
    for key in uns:
        node = uns[key]
        if is_array(node) and node.shape == () and node.dtype.kind in "OUST":
            value = node[()]
            texts[str(key)] = value.decode(errors="replace") if isinstance(value, bytes) else str(value)
    return texts
