# SPDX-License-Identifier: Apache-2.0
"""What every input format comes down to: cells' metadata, features, and matrices by name."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from megacell.store.errors import DataError
from megacell.store.sources.h5_matrix import Matrix


class Container(ABC):
    """One input, opened. Matrices go by "X", "raw" and "layer:NAME".

    Attributes
    ----------
    path : Path
    format : str
        As the manifest names it.
    obs, var : DataFrame
        Of all cells, in the file's order, and of X's columns.
    uns : dict of str
        The file's own texts about itself.
    notes : list of str
        What was mended in reading.
    """

    format = ""

    def __init__(self, path: Path, obs: pd.DataFrame, var: pd.DataFrame, uns: dict[str, str] | None = None) -> None:
        if not len(obs) or not len(var):
            raise DataError(f"{path}: holds {len(obs)} cells and {len(var)} genes; leave it out")
        self.path, self.obs, self.var, self.uns = path, obs, var, uns or {}
        self.notes: list[str] = getattr(self, "notes", [])

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
