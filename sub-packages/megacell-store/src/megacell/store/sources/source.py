# SPDX-License-Identifier: Apache-2.0
"""A source of cells, of whatever format: its counts, its genes and its cells, block by block."""

import os
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Self

import numpy as np
import pandas as pd
import scipy.sparse as sp

from megacell.core.errors import DataError, UsageError
from megacell.store.format.blocks import ROWS, Block
from megacell.store.format.canonical import BAD_COLUMN, FRACTIONAL, NEGATIVE, NOT_FINITE, TOO_LARGE, canonical_rows
from megacell.store.processes.watchdog import watched
from megacell.store.sources.choice import Choice, Settled, choose_counts, reopen_counts, sample
from megacell.store.sources.container import Container
from megacell.store.sources.count_kinds import LENGTH_NORMALISED, UMI
from megacell.store.sources.features import read_id_map
from megacell.store.sources.matrix import DAMAGE, Matrix, first_line, is_of_machine
from megacell.store.sources.recover import recover_rows, tolerances
from megacell.store.sources.registry import open_container
from megacell.store.sources.species import SPECIES_COLUMNS, species_of

Array = np.ndarray[Any, Any]


class NotWhole(DataError):
    """A source taken for whole counts turned out to hold fractions further on."""


class CellSource:
    """One source, opened for reading. Made by `open_source`; a context manager.

    Attributes
    ----------
    path : Path
    n_cells : int
        All cells of the file.
    gene_ids, symbols, biotypes : object str [genes]
        Distinct genes; "" where unknown.
    ids : str
        "ensembl" or "symbol": what `gene_ids` are.
    kind : str
        "umi", "fractional" or "length-normalised".
    matrix : str
        Where the counts were found: "X", "raw", "layer:NAME", "recover:…".
    settled : Settled
        By which the file can be opened again without another look for counts.
    obs_columns : list of str
        Names of the columns of the cells' metadata.
    """

    def __init__(self, file: Container, choice: Choice) -> None:
        self.path, self._file, self._choice = file.path, file, choice
        self.format, self.n_cells, self.obs_columns = file.format, file.n_cells, file.obs_columns
        features = choice.features
        self.gene_ids, self.symbols, self.biotypes = features.gene_ids, features.symbols, features.biotypes
        self.ids = features.ids
        settled = self.settled = choice.settled
        self.kind = settled.kind
        self.matrix = settled.name if settled.precision is None else f"recover:{settled.name}"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    @property
    def notes(self) -> list[str]:
        """What was dropped, summed or found ambiguous so far."""
        return [*self._file.notes, *self._choice.features.notes]

    def obs(self, start: int = 0, stop: int | None = None, names: Collection[str] | None = None) -> pd.DataFrame:
        """Return the metadata of cells `start` up to `stop`, index kept, in the file's order.

        With `names`, only these columns, and the cells' names only where "index" is among them.
        """
        return self._file.obs(start, self.n_cells if stop is None else stop, names)

    def stated_species(self) -> set[str]:
        """Return what the file says of its cells' species, beside `species_of` its obs."""
        stated = {text for key, text in self._file.uns.items() if key in SPECIES_COLUMNS}
        return stated | species_of(self._file.var)

    @property
    def stored_values(self) -> int:
        """Number of values above zero in the file's matrix, for a dense one about."""
        return self._choice.matrix.stored()

    def graph_names(self) -> list[str]:
        """Return the names of the graphs between cells that the source has; DataError if they cannot be read."""
        try:
            return self._file.graph_names()
        except DAMAGE as error:
            line = first_line(error)
            raise DataError(
                f"{self.path}: obsp cannot be read ({line}); the file is damaged, fetch it again"
            ) from error

    def graphs(self, names: Sequence[str]) -> dict[str, Matrix]:
        """Open those of the named graphs between cells that the source has: cells x cells, by row of the source.

        Raises
        ------
        DataError
            One that cannot be read or is not square over the source's cells.
        UsageError
            Several names for a source whose one graph has none.
        """
        try:
            found = self._file.graphs(names)
        except DAMAGE as error:
            line = first_line(error)
            raise DataError(f"{self.path}: its graphs cannot be read ({line}); leave --neighbours out") from error
        for name, matrix in found.items():
            if matrix.shape != (self.n_cells, self.n_cells):
                fix = f"write the file again, or leave --neighbours {name} out"
                raise DataError(f"{matrix.place}: is {matrix.shape}, not square over {self.n_cells:,} cells; {fix}")
            matrix.scratch = self._choice.matrix.scratch
        return found

    def sampled_totals(self) -> Array:
        """Return the counts of cells spread over the file: float64 [some cells]."""
        indptr, values = sample(self._choice)
        padded = np.append(values.astype(np.float64), 0.0)  # reduceat needs a value where the last cells have none
        totals: Array = np.add.reduceat(padded, indptr[:-1])
        totals[np.diff(indptr) == 0] = 0.0
        return totals

    def blocks(self, rows: int = ROWS, start: int = 0, stop: int | None = None) -> Iterator[sp.csr_matrix]:
        """Yield cells in the file's order, all or those from `start` to `stop`, at most `rows` at a time.

        Yields
        ------
        csr_matrix float32 | float64 [cells, genes]
            Sorted, without duplicates or zeros; columns as `gene_ids`.

        Raises
        ------
        DataError
            The file is damaged, or has values that are no counts of the source's kind.
        """
        numbers = np.arange(len(self.gene_ids), dtype=np.int32)
        for indptr, genes, values in self.canonical(numbers, len(numbers), start=start, stop=stop, rows=rows):
            yield sp.csr_matrix((values, genes.astype(np.int32), indptr), (len(indptr) - 1, len(numbers)))

    def canonical(
        self,
        numbers: Array,
        n_genes: int,
        *,
        start: int = 0,
        stop: int | None = None,
        keep: Array | None = None,
        rows: int = ROWS,
    ) -> Iterator[tuple[Array, Array, Array]]:
        """Yield rows as `canonical_rows` makes them, genes numbered by the caller.

        Parameters
        ----------
        numbers : int32 [genes]
            The caller's number of each of `gene_ids`.
        n_genes : int
            One more than the largest number.
        start, stop : int
            Rows of the file.
        keep : bool [n_cells], optional
            Rows to yield.
        rows : int
            At most so many at a time.
        """
        choice = self._choice
        gene_of = np.where(choice.features.gene_of >= 0, numbers[choice.features.gene_of], -1).astype(np.int32)
        stop = self.n_cells if stop is None else stop
        for first, indptr, columns, values in _ahead(choice.matrix.blocks(start, stop, rows)):
            kept = np.ones(len(indptr) - 1, bool) if keep is None else keep[first : first + len(indptr) - 1]
            if choice.settled.precision is not None:
                values = self._recovered(first, indptr, values, choice.settled.precision)
            out_indptr, genes, out, flags, bad = canonical_rows(indptr, columns, values, kept, gene_of, n_genes)
            self._check(flags, first + bad)
            yield out_indptr, genes, out

    def _check(self, flags: int, row: int) -> None:
        """Raise for values that no count has."""
        where = f"{self._choice.matrix.place}, cell {row}"
        for flag, what in ((NOT_FINITE, "a NaN or infinite value"), (NEGATIVE, "a negative value")):
            if flags & flag:
                raise DataError(f"{where}: {what}; give the matrix that holds counts: --counts X|raw|layer:NAME")
        if flags & TOO_LARGE and self.kind == UMI:
            raise DataError(f"{where}: a count over 4,294,967,295; give the matrix that holds counts: --counts …")
        if flags & BAD_COLUMN:
            raise DataError(f"{where}: a column that does not exist; the file is damaged, fetch it again")
        if flags & FRACTIONAL and self.kind == UMI:
            raise NotWhole(f"{where}: a fraction among whole counts; give the matrix that holds counts: --counts …")

    def _recovered(self, first: int, indptr: Array, values: Array, precision: float) -> Array:
        """Return a block's whole counts, or raise for the first cell that cannot be proven."""
        place = self._choice.matrix.place
        if len(values) and not (np.isfinite(values).all() and values.min() >= 0):
            raise DataError(
                f"{place}: negative, NaN or infinite values are no logarithms of counts; --counts X|raw|layer:NAME"
            )
        counts = np.zeros(len(values), np.float64)
        some = np.flatnonzero(values)
        pointers = np.searchsorted(some, indptr)
        found = values[some]
        whole, bad = recover_rows(pointers, found.astype(np.float64), tolerances(found, precision))
        if bad >= 0:
            fix = "find the file's counts: --counts X|raw|layer:NAME"
            raise DataError(f"{place}, cell {first + bad}: no whole counts encode to the stored values; {fix}")
        counts[some] = whole
        return counts


def _ahead(blocks: Iterator[Block]) -> Iterator[Block]:
    """Yield blocks; while the caller works on one, another thread reads and unpacks the next."""
    with ThreadPoolExecutor(1) as reader:
        coming = reader.submit(next, blocks, None)
        while (block := coming.result()) is not None:
            coming = reader.submit(next, blocks, None)
            yield block


def open_source(
    path: str | os.PathLike[str],
    counts: str = "auto",
    gene_ids: str = "auto",
    *,
    allow_length_normalised: bool = False,
    id_map: Path | None = None,
    scratch: Path | None = None,
    settled: Settled | None = None,
    block: int = 0,
) -> CellSource:
    """Open a file or folder of cells and find its counts and genes.

    Parameters
    ----------
    path : path-like
        .h5ad, .h5mu (its RNA), .loom, 10x .h5, a folder that is AnnData's Zarr or Cell Ranger's .mtx.
    counts : str
        "auto", "X", "raw", "layer:NAME", "layers:A+B" for a sum, or "recover" for whole counts out of log1p values.
    gene_ids : str
        "auto" (found by content), "index", or a column of var.
    allow_length_normalised : bool
        Take TPM, to which medians of counts do not apply.
    id_map : Path, optional
        CSV or TSV of two columns, what the file names a gene and its id.
    scratch : Path, optional
        Folder for the temporary files by which a CSC matrix is read by rows; the system's own unless given.
    settled : Settled, optional
        What an earlier opening of the same file settled; `counts` is not looked at then.
    block : int
        Which block of an archive of bionemo-scdl; any other source has one.

    Raises
    ------
    DataError
        Not such a file, damaged, empty, or without counts where they were looked for.
    UsageError
        No such file, layer or column.
    """
    path = Path(path)
    if not path.exists():
        raise UsageError(f"{path}: no such file; check the path")
    own_ids = read_id_map(id_map) if id_map else None
    file = None
    try:
        with watched():
            file = open_container(path, block)
        if settled:
            choice = reopen_counts(file, settled, gene_ids, own_ids)
        else:
            choice = choose_counts(file, counts, gene_ids, own_ids)
        choice.matrix.scratch = scratch
        if choice.settled.kind == LENGTH_NORMALISED and not allow_length_normalised:
            fix = "give counts, or --allow-length-normalised (medians of counts do not apply)"
            raise DataError(f"{choice.matrix.place}: totals of a million look like TPM; {fix}")
        return CellSource(file, choice)
    except DAMAGE as error:
        if file is not None:
            file.close()
        if is_of_machine(error):
            raise
        raise DataError(f"{path}: cannot be read ({first_line(error)}); the file is damaged, fetch it again") from error
    except BaseException:
        if file is not None:
            file.close()
        raise
