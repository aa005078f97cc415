# SPDX-License-Identifier: Apache-2.0
"""AnnData's .h5ad files as a source: which matrix holds the counts, its genes, its cells, block by block."""

import os
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pandas as pd
import scipy.sparse as sp
from megacell.store.canonical import BAD_COLUMN, FRACTIONAL, NEGATIVE, NOT_FINITE, TOO_LARGE, canonical_rows
from megacell.store.counts import FRACTIONAL as FRACTIONAL_KIND
from megacell.store.counts import LENGTH_NORMALISED, UMI, Verdict, judge
from megacell.store.errors import DataError, UsageError
from megacell.store.genes import Features, read_features
from megacell.store.recover import recover_rows, stored_precision, tolerances
from megacell.store.sources.h5_matrix import ROWS, Matrix, open_matrix
from megacell.store.species import stated_species

Array = np.ndarray[Any, Any]

# layers that `auto` takes for counts by their name; spliced and unspliced, say, are whole numbers too, but parts
COUNT_LAYERS = ("counts", "raw_counts", "count", "raw", "umi", "umis", "umi_counts")
SAMPLE_RUNS, SAMPLE_RUN = 16, 32  # a matrix is judged by this many runs of so many cells, spread over the file


class NotWhole(DataError):
    """A source taken for whole counts turned out to hold fractions further on."""


@dataclass(frozen=True)
class Choice:
    """The matrix that was chosen: its name ("X", "raw", "layer:NAME"), reader, genes and kind of counts."""

    name: str
    matrix: Matrix
    features: Features
    kind: str
    precision: float | None = None  # set where counts are recovered from logarithms stored so precisely


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
        self.ids, self.notes, self.kind = features.ids, list(features.notes), choice.kind
        self.matrix = choice.name if choice.precision is None else f"recover:{choice.name}"
        self.stated_species = stated

    def __enter__(self) -> "H5adSource":
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

        """
        choice = self._choice
        gene_of = np.where(choice.features.gene_of >= 0, numbers[choice.features.gene_of], -1).astype(np.int32)
        stop = self.n_cells if stop is None else stop
        for first, indptr, columns, values in choice.matrix.blocks(start, stop, rows):
            kept = np.ones(len(indptr) - 1, bool) if keep is None else keep[first : first + len(indptr) - 1]
            if choice.precision is not None:
                values = self._recovered(first, indptr, values, choice.precision)
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
) -> H5adSource:
    """Open an .h5ad file and find its counts and genes.

    Parameters
    ----------
    path : path-like
    counts : str
        "auto", "X", "raw", "layer:NAME", or "recover" for whole counts out of log1p values.
    gene_ids : str
        "auto" (found by content), "index", or a column of var.
    allow_length_normalised : bool
        Take TPM, to which medians of counts do not apply.

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
        raise DataError(f"{path}: {what} ({_line(error)}); fetch it again") from None
    try:
        obs, var, uns = _frames(file, path)
        choice = _choose(file, path, obs, var, counts, gene_ids)
        if choice.kind == LENGTH_NORMALISED and not allow_length_normalised:
            mend = "give counts, or --allow-length-normalised (medians of counts do not apply)"
            raise DataError(f"{choice.matrix.place}: totals of a million look like TPM; {mend}")
        return H5adSource(file, path, obs, choice, stated_species(obs, var, uns))
    except BaseException:
        file.close()
        raise


def _line(error: BaseException) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def _frames(file: h5py.File, path: Path) -> tuple[pd.DataFrame, pd.DataFrame, dict[str, str]]:
    """Read obs, var and the texts of uns through AnnData's own reader."""
    for name in ("obs", "var"):
        if name not in file:
            raise DataError(f"{path}: has no {name}, so it is no .h5ad file; give one that AnnData wrote")
    obs, var = _frame(file, "obs", path), _frame(file, "var", path)
    if not len(obs) or not len(var):
        raise DataError(f"{path}: holds {len(obs)} cells and {len(var)} genes; leave it out")
    uns: dict[str, str] = {}
    for key, node in file["uns"].items() if "uns" in file else ():
        if isinstance(node, h5py.Dataset) and node.shape == () and h5py.check_string_dtype(node.dtype):
            uns[key] = str(node.asstr()[()])
    return obs, var, uns


def _frame(file: h5py.File, name: str, path: Path) -> pd.DataFrame:
    from anndata.io import read_elem  # slow to import, and `megacell --help` comes by here

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of old encodings, which are read all the same
            frame = read_elem(file[name])
    except Exception as error:  # whatever AnnData's reader says of a damaged element
        raise DataError(
            f"{path}: {name} cannot be read ({_line(error)}); the file is damaged, fetch it again"
        ) from error
    if not isinstance(frame, pd.DataFrame):
        raise DataError(f"{path}: {name} is no table; write the file again with anndata")
    return frame


def _choose(file: h5py.File, path: Path, obs: pd.DataFrame, var: pd.DataFrame, counts: str, gene_ids: str) -> Choice:
    """Find the matrix that `counts` names, or for "auto" the fullest one that holds counts."""
    names = _matrices(file)
    if not names:
        raise DataError(f"{path}: has no matrix (X, raw or layers); give a file with counts")
    if counts == "recover":
        full = max(names, key=lambda name: (_columns(file, name), name == "raw"))
        return _recoverable(_open(file, path, full, obs, var, gene_ids))
    if counts != "auto":
        if counts not in names:
            raise UsageError(f"{path}: has no {counts}; --counts can be auto, {', '.join(names)} or recover")
        found = _open(file, path, counts, obs, var, gene_ids)
        verdict = _judge(found)
        if not verdict.kind:
            others = ", ".join(f"--counts {name}" for name in [*names, "recover"] if name != counts)
            raise DataError(f"{found.matrix.place} {verdict.reason}; give the one that holds counts: {others}")
        return Choice(found.name, found.matrix, found.features, verdict.kind)
    return _automatic(file, path, obs, var, names, gene_ids)


def _automatic(
    file: h5py.File, path: Path, obs: pd.DataFrame, var: pd.DataFrame, names: list[str], gene_ids: str
) -> Choice:
    """Take the fullest of X, raw and the layers named after counts; whole ones before fractions."""
    known = [n for n in names if not n.startswith("layer:") or n.removeprefix("layer:").lower() in COUNT_LAYERS]
    found = {name: _open(file, path, name, obs, var, gene_ids) for name in known}
    verdicts = {name: _judge(choice) for name, choice in found.items()}
    width = {name: len(choice.features.gene_ids) for name, choice in found.items()}
    good = [name for name in known if verdicts[name].is_counts] or [n for n in known if verdicts[n].kind]
    if not good:
        reasons = "; ".join(f"{name} {verdicts[name].reason}" for name in known) or "no matrix looked at"
        options = ", ".join(f"--counts {name}" for name in [*(n for n in names if n not in known), "recover"])
        raise DataError(f"{path}: no counts found ({reasons}); name the matrix that holds them: {options}")
    best = max(good, key=lambda name: (width[name], verdicts[name].kind == UMI, -known.index(name)))
    fuller = [name for name in known if width[name] > width[best]]
    if fuller:
        reasons = "; ".join(f"{name} has {width[name]:,} genes but {verdicts[name].reason}" for name in fuller)
        mend = f"--counts recover for all genes, --counts {best} for these alone"
        raise DataError(f"{path}: {best} holds counts of only {width[best]:,} genes ({reasons}); {mend}")
    choice = found[best]
    return Choice(best, choice.matrix, choice.features, verdicts[best].kind)


def _matrices(file: h5py.File) -> list[str]:
    """Return the names of a file's matrices: raw first, then X, then layers."""
    names = ["raw"] if "raw" in file and "X" in file["raw"] else []
    names += ["X"] if "X" in file else []
    return names + [f"layer:{name}" for name in (file["layers"] if "layers" in file else ())]


def _node(file: h5py.File, name: str) -> Any:
    if name == "raw":
        return file["raw/X"]
    return file["X"] if name == "X" else file["layers"][name.removeprefix("layer:")]


def _columns(file: h5py.File, name: str) -> int:
    node = _node(file, name)
    shape = node.shape if isinstance(node, h5py.Dataset) else node.attrs.get("shape", (0, 0))
    return int(shape[-1]) if not name.startswith("layer:") else -1


def _open(file: h5py.File, path: Path, name: str, obs: pd.DataFrame, var: pd.DataFrame, gene_ids: str) -> Choice:
    place = f"{path}: {name}"
    of_raw = name == "raw"
    own = _frame(file, "raw/var", path) if of_raw and "var" in file["raw"] else var
    matrix = open_matrix(_node(file, name), place, len(obs), len(own))
    return Choice(name, matrix, read_features(own, place, gene_ids, var if of_raw else None), "")


def _sample(choice: Choice) -> tuple[Array, Array]:
    """Return indptr and values of cells spread over the file, genes only."""
    n = choice.matrix.shape[0]
    starts = np.linspace(0, max(0, n - SAMPLE_RUN), SAMPLE_RUNS).astype(np.int64)
    rows = np.unique(np.concatenate([np.arange(s, min(s + SAMPLE_RUN, n)) for s in starts]))
    _, indptr, columns, values = choice.matrix.sample(rows)
    keep, n_genes = np.ones(len(rows), bool), len(choice.features.gene_ids)
    out_indptr, _, out, _, _ = canonical_rows(indptr, columns, values, keep, choice.features.gene_of, n_genes)
    return out_indptr, out


def _judge(choice: Choice) -> Verdict:
    return judge(*_sample(choice))


def _recoverable(choice: Choice) -> Choice:
    """Return the choice with the precision that its logarithms are stored to."""
    _, values = _sample(choice)
    if not len(values) or not np.isfinite(values).all() or values.min() < 0:
        raise DataError(f"{choice.matrix.place}: no logarithms of counts to recover from; --counts X|raw|layer:NAME")
    return Choice(choice.name, choice.matrix, choice.features, UMI, stored_precision(values))


__all__ = ["FRACTIONAL_KIND", "Choice", "H5adSource", "NotWhole", "open_h5ad"]
