# SPDX-License-Identifier: Apache-2.0
"""Which matrix of an .h5ad file holds the counts: named by the user, or the fullest that proves to be counts."""

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pandas as pd

from megacell.store.canonical import canonical_rows
from megacell.store.counts import UMI, Verdict, judge
from megacell.store.errors import DataError, UsageError
from megacell.store.genes import Features, read_features
from megacell.store.recover import stored_precision
from megacell.store.sources.h5_matrix import Matrix, open_matrix

Array = np.ndarray[Any, Any]

# layers that `auto` takes for counts by their name; spliced and unspliced, say, are whole numbers too, but parts
COUNT_LAYERS = ("counts", "raw_counts", "count", "raw", "umi", "umis", "umi_counts")
SAMPLE_RUNS, SAMPLE_RUN = 16, 32  # a matrix is judged by this many runs of so many cells, spread over the file


@dataclass(frozen=True)
class Settled:
    """What was found out about a file's counts, so that opening it again need not judge again.

    Attributes
    ----------
    name : str
        "X", "raw" or "layer:NAME".
    kind : str
        Kind of counts.
    precision : float or None
        Set where counts are recovered from logarithms that are stored so precisely.
    """

    name: str
    kind: str
    precision: float | None = None


@dataclass(frozen=True)
class Choice:
    """The matrix that was chosen: what is settled about it, its reader and its genes."""

    settled: Settled
    matrix: Matrix
    features: Features


def choose_counts(
    file: h5py.File, path: Path, obs: pd.DataFrame, var: pd.DataFrame, counts: str, gene_ids: str
) -> Choice:
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
        return _settle(found, verdict.kind)
    return _automatic(file, path, obs, var, names, gene_ids)


def _automatic(
    file: h5py.File, path: Path, obs: pd.DataFrame, var: pd.DataFrame, names: list[str], gene_ids: str
) -> Choice:
    """Take the fullest of the layers named after counts, raw and X; whole counts before fractions."""
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
    return _settle(found[best], verdicts[best].kind)


def reopen_counts(
    file: h5py.File, path: Path, obs: pd.DataFrame, var: pd.DataFrame, settled: Settled, gene_ids: str
) -> Choice:
    """Open the matrix that an earlier look at the same file settled on."""
    found = _open(file, path, settled.name, obs, var, gene_ids)
    return Choice(settled, found.matrix, found.features)


def _settle(found: Choice, kind: str, precision: float | None = None) -> Choice:
    return Choice(Settled(found.settled.name, kind, precision), found.matrix, found.features)


def _matrices(file: h5py.File) -> list[str]:
    """Return the names of a file's matrices, the likeliest to hold counts first."""
    names = [f"layer:{name}" for name in file.get("layers", ())]
    names += ["raw"] if "raw" in file and "X" in file["raw"] else []
    names += ["X"] if "X" in file and file["X"].attrs.get("encoding-type") != "null" else []
    return names


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
    own = read_frame(file, "raw/var", path) if of_raw and "var" in file["raw"] else var
    matrix = open_matrix(_node(file, name), place, len(obs), len(own))
    return Choice(Settled(name, ""), matrix, read_features(own, place, gene_ids, var if of_raw else None))


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
    return _settle(choice, UMI, stored_precision(values))


def read_frame(file: h5py.File, name: str, path: Path) -> pd.DataFrame:
    """Read obs, var or raw's var through AnnData's own reader."""
    from anndata.io import read_elem  # slow to import, and `megacell --help` comes by here

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of old encodings, which are read all the same
            frame = read_elem(file[name])
    except Exception as error:  # whatever AnnData's reader says of a damaged element
        raise DataError(
            f"{path}: {name} cannot be read ({first_line(error)}); the file is damaged, fetch it again"
        ) from error
    if not isinstance(frame, pd.DataFrame):
        raise DataError(f"{path}: {name} is no table; write the file again with anndata")
    return frame


def first_line(error: BaseException) -> str:
    """Return an error's message without what follows its first line."""
    return str(error).splitlines()[0] if str(error) else type(error).__name__
