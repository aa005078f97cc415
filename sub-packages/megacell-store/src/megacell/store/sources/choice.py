# SPDX-License-Identifier: Apache-2.0
"""Which matrix of a file holds the counts: named by the user, or the fullest that proves to be counts."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from megacell.core.errors import DataError, UsageError
from megacell.store.format.canonical import canonical_rows
from megacell.store.processes.watchdog import watched
from megacell.store.sources.container import Container
from megacell.store.sources.count_kinds import UMI, Verdict, judge
from megacell.store.sources.features import Features, read_features
from megacell.store.sources.layouts import Sum
from megacell.store.sources.matrix import Matrix
from megacell.store.sources.recover import recover_rows, stored_precision, tolerances

Array = np.ndarray[Any, Any]
Ids = tuple[str, Mapping[str, str] | None]  # where gene ids are, and the user's own map of them
# layers that `auto` takes for counts by their name; spliced and unspliced, say, are whole numbers too, but parts
COUNT_LAYERS = ("counts", "raw_counts", "count", "raw", "umi", "umis", "umi_counts")
SAMPLE_RUNS, SAMPLE_RUN = 16, 32  # a matrix is judged by this many runs of so many cells, spread over the file


@dataclass(frozen=True)
class Settled:
    """What was found out about a file's counts, so that opening it again need not judge again.

    Attributes
    ----------
    name : str
        "X", "raw", "layer:NAME" or "layers:A+B".
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


def choose_counts(file: Container, counts: str, gene_ids: str, id_map: Mapping[str, str] | None = None) -> Choice:
    """Find the matrix that `counts` names, or for "auto" the fullest one that holds counts."""
    path = file.path
    with watched():
        names = file.matrices()
    ids = (gene_ids, id_map)
    if not names:
        raise DataError(f"{path}: has no matrix (X, raw or layers); give a file with counts")
    if counts == "recover":
        return _recoverable(_open(file, _fullest(file, names), ids))
    if counts != "auto":
        if not set(_parts_of(counts)) <= set(names):
            raise UsageError(f"{path}: has no {counts}; --counts can be auto, {', '.join(names)} or recover")
        found = _open(file, counts, ids)
        verdict = _judge(found)
        if not verdict.kind:
            raise DataError(f"{found.matrix.place} {verdict.reason}; {_mend(file, names, ids, {counts})}")
        return _settle(found, verdict.kind)
    return _automatic(file, names, ids)


def _automatic(file: Container, names: list[str], ids: Ids) -> Choice:
    """Take the fullest of the layers named after counts, raw and X; whole counts before fractions."""
    known = [n for n in names if not n.startswith("layer:") or n.removeprefix("layer:").lower() in COUNT_LAYERS]
    found = {name: _open(file, name, ids) for name in known}
    verdicts = {name: _judge(choice) for name, choice in found.items()}
    width = {name: len(choice.features.gene_ids) for name, choice in found.items()}
    good = [name for name in known if verdicts[name].is_counts] or [n for n in known if verdicts[n].kind]
    if not good:
        reasons = "; ".join(f"{name} {verdicts[name].reason}" for name in known) or "no matrix looked at"
        raise DataError(f"{file.path}: no counts found ({reasons}); {_mend(file, names, ids, set(known))}")
    best = max(good, key=lambda name: (width[name], verdicts[name].kind == UMI, -known.index(name)))
    fuller = [name for name in known if width[name] > width[best]]
    if fuller:
        reasons = "; ".join(f"{name} has {width[name]:,} genes but {verdicts[name].reason}" for name in fuller)
        fix = f"--counts {best} takes these alone"
        if _recovers(_open(file, _fullest(file, names), ids)):
            fix += ", --counts recover all genes"
        raise DataError(f"{file.path}: {best} holds counts of only {width[best]:,} genes ({reasons}); {fix}")
    return _settle(found[best], verdicts[best].kind)


def _fullest(file: Container, names: list[str]) -> str:
    with watched():
        return max(names, key=lambda name: (file.columns(name), name == "raw"))


def _mend(file: Container, names: list[str], ids: Ids, looked_at: set[str]) -> str:
    """Say which options would find counts in a file where the ones asked for did not, and none that would not."""
    options = [name for name in names if name not in looked_at and _judge(_open(file, name, ids)).kind]
    if _recovers(_open(file, _fullest(file, names), ids)):
        options.append("recover")
    if not options:
        return "no matrix of the file holds counts, or values that counts can be recovered from; give one that does"
    return "give " + ", ".join(f"--counts {name}" for name in options)


def _recovers(choice: Choice) -> bool:
    """True if whole counts are proven for a sample of cells."""
    indptr, values = sample(choice)
    if not len(values) or not np.isfinite(values).all() or values.min() < 0 or (values == np.floor(values)).all():
        return False
    return bool(recover_rows(indptr, values.astype(np.float64), tolerances(values, stored_precision(values)))[1] < 0)


def reopen_counts(file: Container, settled: Settled, gene_ids: str, id_map: Mapping[str, str] | None = None) -> Choice:
    """Open the matrix that an earlier look at the same file settled on."""
    found = _open(file, settled.name, (gene_ids, id_map))
    return Choice(settled, found.matrix, found.features)


def _settle(found: Choice, kind: str, precision: float | None = None) -> Choice:
    return Choice(Settled(found.settled.name, kind, precision), found.matrix, found.features)


def _parts_of(name: str) -> list[str]:
    """Return the matrices that a name adds up: "layers:A+B" names two, any other itself."""
    if not name.startswith("layers:"):
        return [name]
    return [f"layer:{part}" for part in name.removeprefix("layers:").split("+")]


def _open(file: Container, name: str, ids: Ids) -> Choice:
    place = f"{file.path}: {name}"
    with watched():
        opened = [file.matrix(part) for part in _parts_of(name)]
    matrix, own = opened[0]
    if len(opened) > 1:
        matrix = Sum([part for part, _ in opened], place)
    other = file.var if own is not file.var else None
    return Choice(Settled(name, ""), matrix, read_features(own, place, ids[0], other, ids[1]))


def sample(choice: Choice) -> tuple[Array, Array]:
    """Return indptr and values of cells spread over the file, genes only."""
    matrix = choice.matrix
    if matrix.sampled is None:
        n = matrix.shape[0]
        starts = np.linspace(0, max(0, n - SAMPLE_RUN), SAMPLE_RUNS).astype(np.int64)
        rows = np.unique(np.concatenate([np.arange(s, min(s + SAMPLE_RUN, n)) for s in starts]))
        _, indptr, columns, values = matrix.sample(rows)
        keep, n_genes = np.ones(len(rows), bool), len(choice.features.gene_ids)
        out_indptr, _, out, _, _ = canonical_rows(indptr, columns, values, keep, choice.features.gene_of, n_genes)
        matrix.sampled = out_indptr, out
    return matrix.sampled


def _judge(choice: Choice) -> Verdict:
    return judge(*sample(choice))


def _recoverable(choice: Choice) -> Choice:
    """Return the choice with the precision that its logarithms are stored to."""
    _, values = sample(choice)
    if not len(values) or not np.isfinite(values).all() or values.min() < 0:
        raise DataError(f"{choice.matrix.place}: no logarithms of counts to recover from; --counts X|raw|layer:NAME")
    return _settle(choice, UMI, stored_precision(values))
