# SPDX-License-Identifier: Apache-2.0
"""Some cells of a store, chosen by a query, read as if they were all; nothing is copied."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import scipy.sparse as sp

from megacell.store.read.reader import Allocate, Array, Rows, StoreReader, cell_numbers

if TYPE_CHECKING:
    from anndata import AnnData

BLOCK = 4096  # cells a block unless asked otherwise


class CellView:
    """Cells of a store by number, ascending; made by `CellStore.select`. Pickles as the store's path and the numbers.

    Attributes
    ----------
    store : CellStore
    cells : int64 [n]
        Their numbers in the store.
    """

    def __init__(self, store: StoreReader, cells: Array) -> None:
        self.store, self.cells = store, cells

    def __len__(self) -> int:
        return len(self.cells)

    def __repr__(self) -> str:
        return f"CellView({len(self):,} cells of {self.store!r})"

    @property
    def shape(self) -> tuple[int, int]:
        """Cells and genes."""
        return len(self.cells), self.store.shape[1]

    @property
    def gene_ids(self) -> Array:
        """As the store's."""
        return self.store.gene_ids

    def rows(self, indices: Any, allocate: Allocate = np.empty) -> sp.csr_matrix:
        """Return counts of cells by their number in the view; as `CellStore.rows`."""
        return self.store.rows(self._cells(indices), allocate)

    def gather(self, indices: Any, allocate: Allocate = np.empty) -> Rows:
        """As `CellStore.gather`, by number in the view."""
        return self.store.gather(self._cells(indices), allocate)

    def blocks(self, size: int = BLOCK) -> Iterator[tuple[int, sp.csr_matrix]]:
        """Yield (number of the first cell, counts) for all cells in order, `size` at a time."""
        for first in range(0, len(self), size):
            yield first, self.store.rows(self.cells[first : first + size])

    def select(self, where: str) -> "CellView":
        """Return the cells of these for which a query holds too."""
        return CellView(self.store, np.intersect1d(self.cells, self.store.cells_where(where), assume_unique=True))

    @property
    def obs(self) -> pd.DataFrame:
        """The cells' metadata."""
        return self.store.obs.iloc[self.cells]

    def obs_column(self, name: str) -> pd.Series:
        """Return one column, without reading the others."""
        return self.store.obs_column(name).iloc[self.cells]

    def to_anndata(self, indices: Any = None) -> "AnnData":
        """As `CellStore.to_anndata`, by number in the view."""
        return self.store.to_anndata(self.cells if indices is None else self._cells(indices))

    def _cells(self, indices: Any) -> Array:
        """Return the numbers in the store of cells given by their number in the view."""
        cells: Array = self.cells[cell_numbers(indices, len(self), self.store.path, " in the view")]
        return cells
