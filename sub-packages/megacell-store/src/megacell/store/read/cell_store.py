# SPDX-License-Identifier: Apache-2.0
"""CellStore: the cells of one generation of a store, read-only."""

import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import pyarrow as pa
import scipy.sparse as sp

from megacell.core.errors import DataError
from megacell.store.format.gene_table import GeneTable
from megacell.store.format.manifest import Manifest, ShardRecord, Source
from megacell.store.format.obs import INDEX, SOURCE, from_table
from megacell.store.format.panels import read_panel
from megacell.store.format.shard import FOLDER, OBS
from megacell.store.format.tables import NO_TABLE, open_table
from megacell.store.read.cell_view import BLOCK, CellView
from megacell.store.read.gather import FIELDS, RowsInPlace, copy_rows, locate
from megacell.store.read.mapped_shard import Shard, map_cells, map_sources
from megacell.store.read.neighbours import Neighbours
from megacell.store.read.query import matching
from megacell.store.read.readahead import will_need
from megacell.store.read.reader import Allocate, Array, Rows, cell_numbers

if TYPE_CHECKING:
    from anndata import AnnData


class CellStore:
    """The cells of a store, at the generation that was opened; made by `CellStore.open`.

    Opening reads the manifest alone. Shards are mapped when a cell of theirs is first asked for, and the pages are
    shared with every other process that reads them. Pickles as its path and generation.

    Attributes
    ----------
    path : Path
    manifest : Manifest
    generation : int
    digest : str
        XXH3-64 of the manifest's bytes, in hexadecimal: names the store's content.
    """

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self.path, self.manifest = path, manifest
        self.generation, self.digest = manifest.generation, manifest.digest
        cells = np.array([shard.cells for shard in manifest.shards], np.int64)
        self._first = np.concatenate([np.zeros(1, np.int64), np.cumsum(cells)])
        self._table = np.zeros((len(cells), FIELDS), np.int64)
        self._shards: list[Shard | None] = [None] * len(cells)
        self._unmapped = len(cells)
        self._mapping = threading.Lock()
        self._graphs: dict[str, Neighbours] = {}

    @classmethod
    def open(cls, path: str | os.PathLike[str], generation: int | None = None) -> "CellStore":
        """Open a store at its newest generation, or at an earlier one.

        Raises
        ------
        DataError
            Not a store, a newer format, a damaged manifest or no such generation.
        """
        store = Path(path)
        return cls(store, Manifest.open(store, generation))

    def __reduce__(self) -> tuple[Any, ...]:
        return CellStore.open, (self.path.absolute(), self.generation)

    def __repr__(self) -> str:
        cells, genes = self.shape
        return f"CellStore({str(self.path)!r}, generation {self.generation}: {cells:,} cells x {genes:,} genes)"

    def __len__(self) -> int:
        return self.manifest.cells

    @property
    def shape(self) -> tuple[int, int]:
        """Cells and genes."""
        return self.manifest.cells, self.manifest.genes

    @cached_property
    def _genes(self) -> GeneTable:
        return GeneTable.read(self.path / self.manifest.genes_file, self.manifest.genes)

    @cached_property
    def gene_ids(self) -> Array:
        """Ids by gene number: object str [genes]."""
        return np.array(self._genes.gene_ids, object)

    @cached_property
    def symbols(self) -> Array:
        """Symbols by gene number, "" where unknown: object str [genes]."""
        return np.array(self._genes.symbols, object)

    @cached_property
    def biotypes(self) -> Array:
        """Biotypes by gene number, "" where unknown: object str [genes]."""
        return np.array(self._genes.biotypes, object)

    # -- counts

    def rows(self, indices: Any, allocate: Allocate = np.empty) -> sp.csr_matrix:
        """Return cells' counts, in any order, repeats allowed.

        Parameters
        ----------
        indices : int array [n], bool array [cells] or slice
            Cells by their number in the store.
        allocate : callable
            As for `gather`, such as a RowBuffer; the matrix lives in its arrays.

        Returns
        -------
        csr_matrix float32 [n, genes]
            Sorted indices.

        Raises
        ------
        DataError
            A cell that does not exist, or a damaged shard.
        """
        indptr, genes, counts = self._gather(self.numbers_of(indices), np.dtype(np.int32), allocate)
        if indptr[-1] < 1 << 31:
            indptr = indptr.astype(np.int32)
        matrix = sp.csr_matrix((counts, genes, indptr), (len(indptr) - 1, self.shape[1]), copy=False)
        matrix.has_sorted_indices = matrix.has_canonical_format = True
        return matrix

    def gather(self, indices: Any, allocate: Allocate = np.empty) -> Rows:
        """Return cells' counts as plain arrays: what `rows` wraps, without the wrapping.

        Parameters
        ----------
        indices : int array [n], bool array [cells] or slice
            Cells by their number in the store.
        allocate : callable
            Makes an array of a size and dtype; give a RowBuffer to use the same memory again.

        Returns
        -------
        indptr : int64 [n + 1]
        genes : uint16 | uint32 [nnz]
            Ascending within a cell.
        counts : float32 [nnz]
        """
        narrow = np.dtype(np.uint16 if self.shape[1] <= 1 << 16 else np.uint32)
        return self._gather(self.numbers_of(indices), narrow, allocate)

    def _gather(self, cells: Array, gene_type: np.dtype[Any], allocate: Allocate) -> Rows:
        if self._unmapped:
            self._map(cells)
        indptr, shard_of, start_of, bad = locate(cells, self._first, self._table)
        if bad < 0:
            genes = allocate(int(indptr[-1]), gene_type)
            counts = allocate(int(indptr[-1]), np.dtype(np.float32))
            bad = copy_rows(self._table, indptr, shard_of, start_of, self.shape[1], genes, counts)
        if bad >= 0:
            raise self.damaged(bad)
        return indptr, genes, counts

    def rows_in_place(self, indices: Any) -> RowsInPlace | None:
        """Return where cells' counts lie in the mapped files, to be read there by `gather.row_in_place`.

        Parameters
        ----------
        indices : int array [n], bool array [cells] or slice
            Cells by their number in the store.

        Returns
        -------
        RowsInPlace or None
            None where some shard holds wider numbers than uint16 genes and uint8 counts: there is only `gather` then.
        """
        if not self._narrow:
            return None
        cells = self.numbers_of(indices)
        if self._unmapped:
            self._map(cells)
        indptr, shard_of, start_of, bad = locate(cells, self._first, self._table)
        if bad >= 0:
            raise self.damaged(bad)
        return RowsInPlace(indptr, shard_of, start_of, self._table, int(np.diff(indptr).max(initial=0)))

    @cached_property
    def _narrow(self) -> bool:
        records = [shard.files for shard in self.manifest.shards]
        wanted = {"indices.npy": "uint16", "counts.npy": "uint8"}
        return all(name in files and files[name].dtype == wanted[name] for files in records for name in wanted)

    def damaged(self, shard: int) -> DataError:
        """Return the error for a shard whose numbers cannot be right."""
        folder = self.path / FOLDER / self.manifest.shards[shard].name
        return DataError(
            f"{folder}: damaged; run `megacell verify {self.path}`, and convert again if that finds nothing"
        )

    def numbers_of(self, indices: Any) -> Array:
        """Return cells, given as for `rows`, by number: checked int64."""
        return cell_numbers(indices, len(self), self.path)

    def _map(self, cells: Array) -> None:
        """Map the shards that the cells are in, where they are not mapped yet."""
        with self._mapping:  # a second mapping would unmap the first under another thread's reading
            for number in np.unique(np.searchsorted(self._first, cells, side="right") - 1):
                if self._shards[number] is None:
                    shard = self._shards[number] = Shard(self.path, self.manifest.shards[number])
                    self._table[number] = shard.table_row(int(self._first[number]))
                    self._unmapped -= 1

    def blocks(self, size: int = BLOCK) -> Iterator[tuple[int, sp.csr_matrix]]:
        """Yield (number of the first cell, counts) for all cells in order, `size` at a time."""
        for first in range(0, len(self), size):
            yield first, self.rows(slice(first, first + size))

    def stored(self, start: int, stop: int) -> Iterator[tuple[int, Array, Array, Array]]:
        """Yield a contiguous range of cells as it lies on disk, without a copy: a piece for each shard it touches.

        Yields
        ------
        first : int
            Number of the piece's first cell.
        indptr : int64 [cells + 1]
            Positions within the shard; subtract the first for the arrays given here.
        genes : uint16 | uint32 [nnz]
        counts : uint8 | uint16 | uint32 | float32 [nnz]
            Of uint8, 255 stands for a larger count (docs/format.md).
        """
        if not 0 <= start <= stop <= len(self):
            raise DataError(f"{self.path}: no cells {start} to {stop}; there are {len(self)}")
        if start == stop:
            return
        self._map(self._first[:-1].clip(start, stop - 1))
        for number, shard in enumerate(self._shards):
            base = int(self._first[number])
            low, high = max(start, base), min(stop, int(self._first[number + 1]))
            if low < high and shard is not None:
                indptr = shard.indptr[low - base : high - base + 1]
                yield low, indptr, shard.indices[indptr[0] : indptr[-1]], shard.counts[indptr[0] : indptr[-1]]

    def prefetch(self, indices: Any) -> int:
        """Ask the system to read these cells from disk meanwhile; returns at once, with the bytes asked for."""
        cells = self.numbers_of(indices)
        if self._unmapped:
            self._map(cells)
        number = np.searchsorted(self._first, cells, side="right") - 1
        asked = 0
        for each in np.unique(number).tolist():
            shard = self._shards[each]
            assert shard is not None
            asked += will_need(shard, cells[number == each] - self._first[each])
        return asked

    def same_genes(self, other: "CellStore") -> bool:
        """True if a gene number means the same gene in both stores, and both have the same genes."""
        own, theirs = (store.manifest.files[store.manifest.genes_file].xxh3 for store in (self, other))
        return own == theirs or bool(np.array_equal(self.gene_ids, other.gene_ids))

    # -- cells

    def select(self, where: str) -> CellView:
        """Return the cells for which a query of their metadata holds, such as ``cell_type == "B"``; no counts are read.

        Raises
        ------
        UsageError
            A query that cannot be evaluated.
        """
        return CellView(self, self.cells_where(where))

    def cells_where(self, query: str) -> Array:
        """Return the numbers of the cells that `select` chooses, int64, ascending."""
        return np.flatnonzero(matching(query, self.obs_columns, self._obs, str(self.path))).astype(np.int64)

    @property
    def sources(self) -> list[Source]:
        """The files that the cells come from, by number."""
        return list(self.manifest.sources)

    @cached_property
    def source_of(self) -> Array:
        """Number of the source of each cell: uint32 [cells]."""
        sources = len(self.manifest.sources)
        return _joined([map_sources(self.path, s, sources) for s in self.manifest.shards], np.dtype(np.uint32))

    @cached_property
    def cell_hash(self) -> Array:
        """Hash of each cell's gene ids and counts: uint64 [cells]; 0 for a cell without counts."""
        parts = [map_cells(self.path, shard, "cell_hash.npy") for shard in self.manifest.shards]
        return _joined(parts, np.dtype(np.uint64))

    def panel(self, source: int) -> Array:
        """Return the genes that a source measured: sorted uint32 numbers."""
        if not 0 <= source < len(self.manifest.sources):
            raise DataError(f"{self.path}: no source {source}; there are {len(self.manifest.sources)}")
        path = self.path / self.manifest.panels_file
        panel = read_panel(path, self.manifest.sources[source].panel)
        if len(panel) and int(panel.max()) >= self.manifest.genes:
            raise DataError(f"{path}: names gene {panel.max()} of {self.manifest.genes}; run `megacell verify`")
        return panel

    @property
    def obs_columns(self) -> list[str]:
        """Names of the metadata's columns, "source" among them."""
        return [column.name for column in self.manifest.obs] + [SOURCE]

    @cached_property
    def obs(self) -> pd.DataFrame:
        """All metadata; the index holds the cells' original names."""
        return self._obs(self.obs_columns)

    def obs_column(self, name: str) -> pd.Series:
        """Return one column, without reading the others."""
        if name not in self.obs_columns:
            raise DataError(f"{self.path}: no obs column {name!r}; there are {', '.join(self.obs_columns)}")
        return self._obs([name])[name]

    def obs_slice(self, columns: Sequence[str] | None = None, start: int = 0, stop: int | None = None) -> pd.DataFrame:
        """Return metadata of the cells start … stop - 1 from their shards alone; cells' names are not read.

        Parameters
        ----------
        columns : sequence of str, optional
            Of `obs_columns`; all by default.
        start, stop : int
            All cells by default.

        Returns
        -------
        DataFrame
            Indexed by the cells' numbers. Whole numbers and booleans are of a nullable type only in a slice with
            missing ones.
        """
        names = self.obs_columns if columns is None else list(columns)
        stop = len(self) if stop is None else stop
        if not 0 <= start <= stop <= len(self):
            raise DataError(f"{self.path}: no cells {start} to {stop}; there are {len(self)}")
        tables, sources = [], [np.zeros(0, np.uint32)]
        for number, shard in enumerate(self.manifest.shards):
            first, last = (int(self._first[number + i]) for i in (0, 1))
            low, high = max(start, first) - first, min(stop, last) - first
            if low < high:
                tables.append(self._obs_table(shard, names).slice(low, high - low))
                sources.append(map_sources(self.path, shard, len(self.manifest.sources))[low:high])
        return self._frame(names, tables or [pa.table({})], np.concatenate(sources), pd.RangeIndex(start, stop))

    def _obs(self, names: list[str]) -> pd.DataFrame:
        source_of = self.source_of  # of real cells: their tables are as long as these
        tables = [self._obs_table(shard, [INDEX, *names]) for shard in self.manifest.shards]
        with self._reading_obs():
            index = pd.Index([name for table in tables for name in table.column(INDEX).to_pylist()], dtype=object)
        return self._frame(names, tables, source_of, index)

    def _frame(self, names: list[str], tables: list[pa.Table], sources: Array, index: pd.Index) -> pd.DataFrame:
        """Return the shards' tables as one frame of the store's schema."""
        columns = {}
        for column in self.manifest.obs:
            if column.name in names:
                with self._reading_obs():
                    columns[column.name] = pd.concat([from_table(t, column) for t in tables], ignore_index=True)
        if SOURCE in names:
            names_of = pd.CategoricalDtype([source.name for source in self.manifest.sources])
            columns[SOURCE] = pd.Series(pd.Categorical.from_codes(sources.astype(np.int64), dtype=names_of))
        frame = pd.DataFrame(columns)
        frame.index = index
        return frame

    def _obs_table(self, shard: ShardRecord, names: list[str]) -> pa.Table:
        with open_table(self.path / FOLDER / shard.name / OBS, 2, shard.cells) as file:
            return file.read([name for name in names if name in file.schema_arrow.names])

    @contextmanager
    def _reading_obs(self) -> Iterator[None]:
        """Turn what is said of a table that is not of the store's schema into an error that names the store."""
        try:
            yield
        except NO_TABLE as error:
            line = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise DataError(f"{self.path}: {OBS} of a shard is damaged ({line}); run `megacell verify`") from None

    def neighbours(self, name: str) -> Neighbours:
        """Return a graph between the cells, by the name that it was converted under, such as "connectivities".

        Raises
        ------
        DataError
            The store has no such graph.
        """
        return self._graphs.setdefault(name, Neighbours(self, name))

    def to_anndata(self, indices: Any = None) -> "AnnData":
        """Return cells as AnnData: counts in X (float32 CSR), metadata in obs, ids and symbols in var."""
        from anndata import AnnData

        cells = self.numbers_of(slice(None) if indices is None else indices)
        var = pd.DataFrame({"symbol": self.symbols}, index=pd.Index(self.gene_ids, dtype=object))
        return AnnData(self.rows(cells), obs=self.obs.iloc[cells].copy(), var=var)


def _joined(parts: Sequence[Array], dtype: np.dtype[Any]) -> Array:
    """Return the shards' arrays as one, mapped if there is one shard."""
    if not parts:
        return np.zeros(0, dtype)
    return parts[0] if len(parts) == 1 else np.concatenate(parts)
