# SPDX-License-Identifier: Apache-2.0
"""Some cells of a store, chosen by a query, read as if they were all; nothing is copied."""

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import scipy.sparse as sp

from megacell.core.errors import DataError

if TYPE_CHECKING:
    from anndata import AnnData

    from megacell.store.read.cell_store import CellStore

Array = np.ndarray[Any, Any]
BLOCK = 4096  # cells a block unless asked otherwise


class CellView:
    """Cells of a store by number, ascending; made by `CellStore.select`. Pickles as the store's path and the numbers.

    Attributes
    ----------
    store : CellStore
    cells : int64 [n]
        Their numbers in the store.
    """

    def __init__(self, store: "CellStore", cells: Array) -> None:
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

    def rows(self, indices: Any, empty: Callable[[int, np.dtype[Any]], Array] = np.empty) -> sp.csr_matrix:
        """Return counts of cells by their number in the view; as `CellStore.rows`."""
        return self.store.rows(self._cells(indices), empty)

    def gather(
        self, indices: Any, empty: Callable[[int, np.dtype[Any]], Array] = np.empty
    ) -> tuple[Array, Array, Array]:
        """As `CellStore.gather`, by number in the view."""
        return self.store.gather(self._cells(indices), empty)

    def blocks(self, size: int = BLOCK) -> Iterator[tuple[int, sp.csr_matrix]]:
        """Yield (number of the first cell, counts) for all cells in order, `size` at a time."""
        for first in range(0, len(self), size):
            yield first, self.store.rows(self.cells[first : first + size])

    def select(self, where: str) -> "CellView":
        """Return the cells of these for which a query holds too."""
        return CellView(self.store, np.intersect1d(self.cells, self.store.select(where).cells, assume_unique=True))

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
        if isinstance(indices, slice):
            return self.cells[indices]
        wanted = np.asarray(indices)
        if wanted.dtype == bool and wanted.shape != self.cells.shape:
            raise DataError(f"{self.store.path}: a mask of shape {wanted.shape} for a view of {len(self)} cells")
        if wanted.dtype != bool and wanted.size and (wanted.dtype.kind not in "iu" or wanted.ndim != 1):
            raise DataError(f"{self.store.path}: cells are asked for by a list of whole numbers")
        if wanted.dtype != bool and wanted.size and (wanted.min() < 0 or wanted.max() >= len(self)):
            raise DataError(f"{self.store.path}: no such cell; the view has {len(self)}")
        cells: Array = self.cells[wanted if wanted.size else np.zeros(0, np.int64)]
        return cells
