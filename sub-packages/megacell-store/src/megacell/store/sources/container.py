# SPDX-License-Identifier: Apache-2.0
"""What every input format comes down to: cells' metadata, features, and matrices by name."""

from abc import ABC, abstractmethod
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from megacell.core.errors import DataError
from megacell.store.sources.matrix import Matrix

ROW_NAMES = "index"  # by which the cells' own names are asked for among the columns of obs


class Container(ABC):
    """One input, opened. Matrices go by "X", "raw" and "layer:NAME".

    Attributes
    ----------
    path : Path
    format : str
        As the manifest names it.
    n_cells : int
        All cells, in the file's order.
    var : DataFrame
        Of X's columns.
    uns : dict of str
        The file's own texts about itself.
    notes : list of str
        What was mended in reading.
    """

    format = ""

    def __init__(self, path: Path, n_cells: int, var: pd.DataFrame, uns: dict[str, str] | None = None) -> None:
        if not n_cells or not len(var):
            raise DataError(f"{path}: holds {n_cells} cells and {len(var)} genes; leave it out")
        self.path, self.n_cells, self.var, self.uns = path, n_cells, var, uns or {}
        self.notes: list[str] = getattr(self, "notes", [])

    @property
    def obs_columns(self) -> list[str]:
        """Names of the columns of the cells' metadata."""
        return []

    @abstractmethod
    def obs(self, start: int, stop: int, names: Collection[str] | None = None) -> pd.DataFrame:
        """Return the metadata of some cells.

        With `names`, only these columns, and the cells' names only where ROW_NAMES is among them.
        """

    def matrices(self) -> list[str]:
        """Return the matrices' names, the likeliest to hold counts first."""
        return ["X"]

    def columns(self, _name: str) -> int:
        """Return how many columns a matrix has, -1 for a layer."""
        return len(self.var)

    @abstractmethod
    def matrix(self, name: str) -> tuple[Matrix, pd.DataFrame]:
        """Open one matrix, with the table of its own columns."""

    def graph_names(self) -> list[str]:
        """Return the names of the graphs between cells that the input has."""
        return []

    def graphs(self, names: Sequence[str]) -> dict[str, Matrix]:
        """Open those of the named graphs that the input has: a row holds the weights of a cell's edges to others."""
        return {}

    @abstractmethod
    def close(self) -> None:
        """Close the file."""


def is_array(node: Any) -> bool:
    """True for a dataset of HDF5 or an array of Zarr, false for a group."""
    return hasattr(node, "shape") and hasattr(node, "dtype")
