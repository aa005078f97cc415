# SPDX-License-Identifier: Apache-2.0
"""What is asked of cells that can be read, whatever holds them, so that no caller needs to know `CellStore`."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import pandas as pd
import scipy.sparse as sp

from megacell.core.errors import DataError
from megacell.store.format.manifest import Manifest

if TYPE_CHECKING:
    from anndata import AnnData

Array = np.ndarray[Any, Any]
Allocate = Callable[[int, Any], Array]  # (size, dtype) → an array [size] with any content, such as `np.empty`
Rows = tuple[Array, Array, Array]  # of `CellReader.gather`


class CellSource(Protocol):
    """One of the files that cells come from.

    Attributes
    ----------
    name : str
    subset : bool
        True if it measured too few genes for medians.
    """

    @property
    def name(self) -> str: ...
    @property
    def subset(self) -> bool: ...


class CellReader(Protocol):
    """Cells by number: what splits, cell sets, batch streams and encoders ask of a `CellStore`, or of its stand-in.

    Attributes
    ----------
    path : Path
    generation : int
    digest : str
        Hexadecimal; names the content.
    gene_ids, symbols : object str [genes]
    sources : sequence of CellSource
    source_of : uint32 [cells]
        Number of the source of each cell.
    cell_hash : uint64 [cells]
        Equal for equal cells.
    obs_columns : list of str
        Names of the metadata's columns.
    """

    path: Path
    generation: int
    digest: str

    @property
    def gene_ids(self) -> Array: ...
    @property
    def symbols(self) -> Array: ...
    @property
    def sources(self) -> Sequence[CellSource]: ...
    @property
    def source_of(self) -> Array: ...
    @property
    def cell_hash(self) -> Array: ...
    @property
    def obs_columns(self) -> list[str]: ...

    def __len__(self) -> int: ...

    def gather(self, indices: Any, allocate: Allocate = np.empty) -> Rows:
        """Return rows of cells as plain arrays: indptr int64 [n + 1], genes [nnz], counts [nnz]."""

    def obs_slice(self, columns: Sequence[str] | None = None, start: int = 0, stop: int | None = None) -> pd.DataFrame:
        """Return metadata of the cells start … stop - 1, indexed by their numbers."""


class StoreReader(CellReader, Protocol):
    """What views and graphs ask of the store that made them: a `CellStore`, which imports both.

    Attributes
    ----------
    manifest : Manifest
    shape : (int, int)
        Cells and genes.
    obs : DataFrame
        All metadata.
    """

    manifest: Manifest

    @property
    def shape(self) -> tuple[int, int]: ...
    @property
    def obs(self) -> pd.DataFrame: ...

    def numbers_of(self, indices: Any) -> Array:
        """Return cells by number: checked int64."""

    def cells_where(self, query: str) -> Array:
        """Return the numbers of the cells for which a query holds, int64, ascending."""

    def rows(self, indices: Any, allocate: Allocate = np.empty) -> sp.csr_matrix:
        """Return cells' counts."""

    def obs_column(self, name: str) -> pd.Series:
        """Return one column of the metadata."""

    def to_anndata(self, indices: Any = None) -> "AnnData":
        """Return cells as AnnData."""


def cell_numbers(wanted: Any, cells: int, path: Path, holder: str = "") -> Array:
    """Return cells by number: checked int64 [n].

    Parameters
    ----------
    wanted : int array [n], bool array [cells] or slice
    cells : int
        How many there are.
    path : Path
        Of the store, for messages.
    holder : str, default ""
        What has so many cells, where it is not the store, for messages: " in the view".

    Raises
    ------
    DataError
        A cell that does not exist, a mask of another length, or no whole numbers.
    """
    if isinstance(wanted, slice):
        return np.arange(*wanted.indices(cells), dtype=np.int64)
    numbers = np.asarray(wanted)
    if numbers.dtype == bool:
        if numbers.shape != (cells,):
            raise DataError(f"{path}: a mask of shape {numbers.shape} for {cells} cells")
        return np.flatnonzero(numbers).astype(np.int64)
    if numbers.ndim != 1 or (numbers.dtype.kind not in "iu" and numbers.size):
        raise DataError(f"{path}: give cells as a list of whole numbers, not {numbers.dtype} {numbers.shape}")
    numbers = np.ascontiguousarray(numbers, np.int64)
    if numbers.size and (numbers.min() < 0 or numbers.max() >= cells):
        wrong = numbers[(numbers < 0) | (numbers >= cells)][0]
        raise DataError(f"{path}: no cell {wrong}{holder}; there are {cells}")
    return numbers
