# SPDX-License-Identifier: Apache-2.0
"""One shard of a plan made: read, filtered, written, and the outcome noted."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from megacell.core.errors import DataError, KilledError, MegacellError, UsageError
from megacell.store.conversion.filters import kept_cells
from megacell.store.conversion.graph_pieces import PieceWriter
from megacell.store.conversion.inspection import Inspection, check_unchanged
from megacell.store.conversion.outcomes import (
    Amendment,
    Outcome,
    amendments,
    note_reading,
    piece_folder,
    source_read,
    write_outcome,
)
from megacell.store.conversion.plan import HASHES, Part, Plan, load_plan, remove_unfinished
from megacell.store.format.obs import OBS_ROWS, tidy
from megacell.store.format.shard import ShardWriter
from megacell.store.processes.watchdog import is_abandoned
from megacell.store.sources.count_kinds import FRACTIONAL, UMI
from megacell.store.sources.source import NotWhole

Array = np.ndarray[Any, Any]


def attempt(store: Path, number: int) -> Outcome:
    """Make one shard of a store's plan, and write down what became of it; bad data are an outcome, no exception."""
    plan = load_plan(store)
    if plan is None:
        raise DataError(f"{store}: its plan is gone; convert again")
    amended = amendments(plan)
    try:
        outcome = _make(plan, number, amended)
    except _SourceError as error:
        fractional = isinstance(error.cause, NotWhole)
        outcome = Outcome(None, {}, error.source, str(error.cause), fractional)
    if is_abandoned():
        raise KilledError(f"{store}: its conversion is gone; convert again")
    write_outcome(plan, number, amended, outcome)
    return outcome


def blame(plan: Plan, number: int, death: str) -> Outcome:
    """Return, and write down, the outcome of a shard whose process died of the source that it was reading.

    Raises
    ------
    DataError
        It was reading none.
    """
    source = source_read(plan, number)
    if source is None:
        raise DataError(f"{plan.store}: a process that wrote a shard died ({death}); convert again")
    path = plan.inspections[source - plan.first].path
    outcome = Outcome(None, {}, source, ended_by(path, death))
    write_outcome(plan, number, amendments(plan), outcome)
    return outcome


def ended_by(path: Path, death: str) -> str:
    """Say that reading a file ended the process that did."""
    return f"{path}: cannot be read (it ends the process that reads it, {death}); the file is damaged, fetch it again"


class _SourceError(Exception):
    """One source of a shard cannot be read."""

    def __init__(self, source: int, cause: MegacellError) -> None:
        super().__init__(str(cause))
        self.source, self.cause = source, cause


@contextmanager
def _reading(source: int) -> Iterator[None]:
    """Say of an error which source it is about."""
    try:
        yield
    except (DataError, UsageError) as error:
        raise _SourceError(source, error) from error


def _make(plan: Plan, number: int, amended: dict[int, Amendment]) -> Outcome:
    name, parts = plan.names[number], plan.shards[number]
    remove_unfinished(plan.store, name)
    parts = [part for part in parts if part.source not in amended or not amended[part.source].left_out]
    found = [_amended(plan.inspections[part.source - plan.first], amended.get(part.source)) for part in parts]
    fractional = any(each.kind != UMI for each in found)
    writer = ShardWriter(plan.store, name, np.load(plan.folder / HASHES), plan.obs, fractional=fractional)
    edges = PieceWriter(piece_folder(plan, name), plan.graphs)
    cells = dict[int, int]()
    try:
        for part, inspection in zip(parts, found, strict=True):
            note_reading(plan, number, part.source)
            with _reading(part.source):
                before = writer.cells
                _add(plan, part, inspection, writer, edges)
                cells[part.source] = cells.get(part.source, 0) + writer.cells - before
        note_reading(plan, number, None)
        return Outcome(writer.finish(), cells, pieces=edges.finish())
    except BaseException:
        writer.abandon()
        edges.abandon()
        raise


def _add(plan: Plan, part: Part, found: Inspection, writer: ShardWriter, edges: PieceWriter) -> None:
    """Write one part's rows, their edges, and the metadata of those that are kept."""
    options = found.sample.options
    with options.open(found.path, found.settled, plan.store) as source:
        check_unchanged(found)
        keep, _ = kept_cells(source, options)
        rows, done = part.start + np.flatnonzero(keep[part.start : part.stop]), 0
        numbers = plan.numbers(part.source - plan.first)
        for indptr, genes, values in source.canonical(numbers, plan.genes, start=part.start, stop=part.stop, keep=keep):
            own, done = rows[done : done + len(indptr) - 1], done + len(indptr) - 1
            enough = _enough(indptr, values, options.min_counts, options.min_genes)
            if not enough.all():
                indptr, genes, values = _filtered(indptr, genes, values, enough)
                keep[own[~enough]] = False
            writer.add(indptr, genes, values, part.source)
        edges.add(source.graphs(list(plan.graphs)), part.start, keep[part.start : part.stop])
        for start in range(part.start, part.stop, OBS_ROWS):
            stop = min(start + OBS_ROWS, part.stop)
            if keep[start:stop].any():
                writer.add_obs(_with(found.sample.obs, tidy(source.obs(start, stop))[keep[start:stop]]))
        check_unchanged(found)


def _with(given: Mapping[str, str], obs: pd.DataFrame) -> pd.DataFrame:
    """Return metadata with what a sheet gives to all cells of a file."""
    codes = np.zeros(len(obs), np.int64)
    own = {name: pd.Categorical.from_codes(codes, dtype=pd.CategoricalDtype([text])) for name, text in given.items()}
    return obs.assign(**own)


def _enough(indptr: Array, values: Array, min_counts: float, min_genes: int) -> Array:
    """Return which rows have the counts and genes asked for: bool [rows]."""
    if min_counts <= 0 and min_genes <= 0:
        return np.ones(len(indptr) - 1, bool)
    sums = np.concatenate([np.zeros(1), np.cumsum(values, dtype=np.float64)])
    wanted: Array = (np.diff(indptr) >= min_genes) & (np.diff(sums[indptr]) >= min_counts)
    return wanted


def _filtered(indptr: Array, genes: Array, values: Array, keep: Array) -> tuple[Array, Array, Array]:
    lengths = np.diff(indptr)
    inside = np.repeat(keep, lengths)
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths[keep])]), genes[inside], values[inside]


def _amended(found: Inspection, amendment: Amendment | None) -> Inspection:
    if amendment is None:
        return found
    assert found.settled is not None
    return replace(found, kind=FRACTIONAL, settled=replace(found.settled, kind=FRACTIONAL))
