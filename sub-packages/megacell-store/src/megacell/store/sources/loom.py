# SPDX-License-Identifier: Apache-2.0
"""Loom files: genes in rows, cells in columns, dense; as Geneformer's users have them."""

from collections.abc import Collection
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pandas as pd

from megacell.core.errors import DataError
from megacell.store.sources.anndata_file import open_h5
from megacell.store.sources.container import ROW_NAMES, Container
from megacell.store.sources.layouts import Columns
from megacell.store.sources.matrix import Matrix, check_complete

_CELL_NAMES = ("CellID", "cell_id", "obs_names", "barcode", "barcodes")
_GENE_NAMES = ("ensembl_id", "Accession", "var_names", "Gene", "gene", "Genes")


class Loom(Container):
    """One .loom file."""

    format = "loom"

    def __init__(self, path: Path) -> None:
        self.file = open_h5(path)
        for name in ("matrix", "row_attrs", "col_attrs"):
            if name not in self.file:
                raise DataError(f"{path}: has no {name}, so it is no .loom file; fetch it again")
        genes, cells = self.file["matrix"].shape
        self._cells = _attributes(self.file["col_attrs"], cells)
        genes_of = _attributes(self.file["row_attrs"], genes)
        super().__init__(path, cells, _frame(genes_of, slice(0, genes), _GENE_NAMES))

    @property
    def obs_columns(self) -> list[str]:
        return list(self._cells)

    def obs(self, start: int, stop: int, names: Collection[str] | None = None) -> pd.DataFrame:
        return _frame(self._cells, slice(start, min(stop, self.n_cells)), _CELL_NAMES, names)

    def matrices(self) -> list[str]:
        layers = [f"layer:{name}" for name in self.file["layers"] if name] if "layers" in self.file else []
        return [*layers, "X"]

    def columns(self, name: str) -> int:
        return len(self.var) if name == "X" else -1

    def matrix(self, name: str) -> tuple[Matrix, pd.DataFrame]:
        node = self.file["matrix"] if name == "X" else self.file["layers"][name.removeprefix("layer:")]
        matrix = Columns(node, f"{self.path}: {name}")
        if matrix.shape != (self.n_cells, len(self.var)):
            raise DataError(f"{matrix.place}: is of another shape than the attributes; the file is damaged")
        return matrix, self.var

    def close(self) -> None:
        self.file.close()


def _attributes(group: h5py.Group, length: int) -> dict[str, h5py.Dataset]:
    """Return the attributes that have one entry a gene or cell."""
    found = {str(k): node for k, node in group.items() if isinstance(node, h5py.Dataset) and node.shape == (length,)}
    for node in found.values():
        check_complete(node)
    return found


def _frame(
    attributes: dict[str, h5py.Dataset], rows: slice, index_names: tuple[str, ...], names: Collection[str] | None = None
) -> pd.DataFrame:
    """Return rows of attributes as a table; the first of `index_names` that is there is the index too."""
    frame = pd.DataFrame(index=pd.RangeIndex(rows.start, rows.stop))
    for name, node in attributes.items():
        if names is None or name in names:
            frame[name] = _texts(node, rows)
    if names is None or ROW_NAMES in names:
        found = next((attributes[name] for name in index_names if name in attributes), None)
        own = frame.index if found is None else _texts(found, rows)
        frame.index = pd.Index(np.asarray(own).astype(str), dtype=object)
    return frame


def _texts(node: h5py.Dataset, rows: slice) -> Any:
    values = node[rows]
    if values.dtype.kind not in "OS":
        return values
    return np.array([v.decode(errors="replace") if isinstance(v, bytes) else str(v) for v in values], object)
