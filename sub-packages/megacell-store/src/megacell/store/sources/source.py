# SPDX-License-Identifier: Apache-2.0
"""AnnData's .h5ad files as a source: which matrix holds the counts, its genes, its cells, block by block."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

import h5py
import numpy as np
import pandas as pd
import scipy.sparse as sp

from megacell.store.canonical import BAD_COLUMN, FRACTIONAL, NEGATIVE, NOT_FINITE, TOO_LARGE, canonical_rows
from megacell.store.counts import LENGTH_NORMALISED, UMI
from megacell.store.errors import DataError, UsageError
from megacell.store.recover import recover_rows, tolerances
from megacell.store.sources.h5_matrix import DAMAGE, ROWS
from megacell.store.sources.h5ad_counts import Choice, Settled, choose_counts, first_line, read_frame, reopen_counts
from megacell.store.species import stated_species

Array = np.ndarray[Any, Any]


class NotWhole(DataError):
    """A source taken for whole counts turned out to hold fractions further on."""


class H5adSource:
    """One .h5ad file, opened for reading. Made by `open_h5ad`; a context manager.

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
    notes : list of str
        What was dropped, summed or found ambiguous.
    stated_species : set of str
        What organism columns say.
    """

    def __init__(self, file: h5py.File, path: Path, obs: pd.DataFrame, choice: Choice, stated: set[str]) -> None:
        self.path, self._file, self._obs, self._choice = path, file, obs, choice
        self.n_cells = len(obs)
        features = choice.features
        self.gene_ids, self.symbols, self.biotypes = features.gene_ids, features.symbols, features.biotypes
        self.ids, self.notes = features.ids, list(features.notes)
        settled = self.settled = choice.settled
        self.kind = settled.kind
        self.matrix = settled.name if settled.precision is None else f"recover:{settled.name}"
        self.stated_species = stated

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def obs(self) -> pd.DataFrame:
        """Return the cells' metadata, index kept, in the file's order."""
        return self._obs

    @property
    def stored_values(self) -> int:
        """Number of values above zero in the file's matrix, for a dense one about."""
        return self._choice.matrix.stored()

    def blocks(self, rows: int = ROWS) -> Iterator[sp.csr_matrix]:
        """Yield all cells in the file's order, at most `rows` at a time.

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
        for indptr, genes, values in self.canonical(numbers, len(numbers), rows=rows):
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
        for first, indptr, columns, values in choice.matrix.blocks(start, stop, rows):
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
            mend = "find the file's counts: --counts X|raw|layer:NAME"
            raise DataError(f"{place}, cell {first + bad}: no whole counts encode to the stored values; {mend}")
        counts[some] = whole
        return counts


def open_h5ad(
    path: str | os.PathLike[str],
    counts: str = "auto",
    gene_ids: str = "auto",
    *,
    allow_length_normalised: bool = False,
    scratch: Path | None = None,
    settled: Settled | None = None,
) -> H5adSource:
    """Open an .h5ad file and find its counts and genes.

    Parameters
    ----------
    path : path-like
        The file.
    counts : str
        "auto", "X", "raw", "layer:NAME", or "recover" for whole counts out of log1p values.
    gene_ids : str
        "auto" (found by content), "index", or a column of var.
    allow_length_normalised : bool
        Take TPM, to which medians of counts do not apply.
    scratch : Path, optional
        Folder for the temporary files by which a CSC matrix is read by rows; the system's own unless given.
    settled : Settled, optional
        What an earlier opening of the same file settled; `counts` is not looked at then.

    Raises
    ------
    DataError
        Not an .h5ad file, damaged, empty, or without counts where they were looked for.
    UsageError
        No such file, layer or column.
    """
    path = Path(path)
    if not path.is_file():
        raise UsageError(f"{path}: no such file")
    try:
        file = h5py.File(path, "r", locking=False)
    except OSError as error:
        what = "is empty" if path.stat().st_size == 0 else "is not an HDF5 file, or is truncated"
        raise DataError(f"{path}: {what} ({first_line(error)}); fetch it again") from None
    try:
        obs, var, uns = _frames(file, path)
        if settled:
            choice = reopen_counts(file, path, obs, var, settled, gene_ids)
        else:
            choice = choose_counts(file, path, obs, var, counts, gene_ids)
        choice.matrix.scratch = scratch
        if choice.settled.kind == LENGTH_NORMALISED and not allow_length_normalised:
            mend = "give counts, or --allow-length-normalised (medians of counts do not apply)"
            raise DataError(f"{choice.matrix.place}: totals of a million look like TPM; {mend}")
        return H5adSource(file, path, obs, choice, stated_species(obs, var, uns))
    except DAMAGE as error:
        file.close()
        raise DataError(f"{path}: cannot be read ({first_line(error)}); the file is damaged, fetch it again") from error
    except BaseException:
        file.close()
        raise


def _frames(file: h5py.File, path: Path) -> tuple[pd.DataFrame, pd.DataFrame, dict[str, str]]:
    """Read obs, var and the texts of uns through AnnData's own reader."""
    for name in ("obs", "var"):
        if name not in file:
            raise DataError(f"{path}: has no {name}, so it is no .h5ad file; give one that AnnData wrote")
    obs, var = read_frame(file, "obs", path), read_frame(file, "var", path)
    if not len(obs) or not len(var):
        raise DataError(f"{path}: holds {len(obs)} cells and {len(var)} genes; leave it out")
    uns: dict[str, str] = {}
    for key, node in file["uns"].items() if "uns" in file else ():
        if isinstance(node, h5py.Dataset) and node.shape == () and h5py.check_string_dtype(node.dtype):
            uns[key] = str(node.asstr()[()])
    return obs, var, uns
