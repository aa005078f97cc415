# SPDX-License-Identifier: Apache-2.0
"""Loom files: genes in rows, cells in columns, dense; as Geneformer's users have them."""

from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pandas as pd

from megacell.store.errors import DataError
from megacell.store.sources.anndata_file import open_h5
from megacell.store.sources.container import Container
from megacell.store.sources.h5_matrix import Columns, Matrix

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
        var = _frame(self.file["row_attrs"], genes, _GENE_NAMES)
        super().__init__(path, _frame(self.file["col_attrs"], cells, _CELL_NAMES), var)

    def matrices(self) -> list[str]:
        layers = [f"layer:{name}" for name in self.file["layers"] if name] if "layers" in self.file else []
        return [*layers, "X"]

    def columns(self, name: str) -> int:
        return len(self.var) if name == "X" else -1

    def matrix(self, name: str) -> tuple[Matrix, pd.DataFrame]:
        node = self.file["matrix"] if name == "X" else self.file["layers"][name.removeprefix("layer:")]
        matrix = Columns(node, f"{self.path}: {name}")
        if matrix.shape != (len(self.obs), len(self.var)):
            raise DataError(f"{matrix.place}: is of another shape than the attributes; the file is damaged")
        return matrix, self.var

    def close(self) -> None:
        self.file.close()


def _frame(group: h5py.Group, length: int, names: tuple[str, ...]) -> pd.DataFrame:
    """Return the one-dimensional attributes as a table; the first of `names` that is there is the index too."""
    columns: dict[str, Any] = {}
    for key, node in group.items():
        if isinstance(node, h5py.Dataset) and node.shape == (length,):
            values = node[()]
            if values.dtype.kind in "OS":
                texts = [v.decode(errors="replace") if isinstance(v, bytes) else str(v) for v in values]
                values = np.array(texts, object)
            columns[str(key)] = values
    index = next((pd.Index(columns[name].astype(str), dtype=object) for name in names if name in columns), None)
    frame = pd.DataFrame(columns, index=range(length))
    frame.index = pd.Index([str(i) for i in range(length)], dtype=object) if index is None else index
    return frame
