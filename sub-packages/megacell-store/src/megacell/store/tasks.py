# SPDX-License-Identifier: Apache-2.0
"""One shard of a plan made, and what became of each: finished, failed, or to be made again."""

import json
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa

from megacell.store.counts import FRACTIONAL, UMI
from megacell.store.durable import TEMPORARY, write_whole
from megacell.store.errors import DataError, MegacellError, UsageError
from megacell.store.filters import kept_cells
from megacell.store.graphs import PieceWriter
from megacell.store.inspection import Inspection, check_unchanged
from megacell.store.manifest import FileRecord, ShardRecord, files_from_json
from megacell.store.obs import tidy, to_table
from megacell.store.plan import HASHES, Part, Plan, load_plan, shard_folder
from megacell.store.shard import ShardWriter
from megacell.store.sources.source import NotWhole

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Outcome:
    """What became of a shard.

    Attributes
    ----------
    record : ShardRecord or None
        None if it failed.
    cells : dict
        Kept, by number of the source.
    source, reason, fractional
        If it failed: the number of the source, why, and whether only because its counts are fractional.
    pieces : dict
        Files of its cells' edges, in `piece_folder`, where graphs were asked for.
    """

    record: ShardRecord | None
    cells: dict[int, int]
    source: int = -1
    reason: str = ""
    fractional: bool = False
    pieces: dict[str, FileRecord] = field(default_factory=dict)


@dataclass(frozen=True)
class Amendment:
    """What turned out of a source after the plan was made: fractional counts, or why it is left out."""

    source: int
    left_out: str = ""


def attempt(store: Path, number: int) -> Outcome:
    """Make one shard of a store's plan, and write down what became of it; bad data are an outcome, no exception."""
    plan = load_plan(store)
    if plan is None:
        raise DataError(f"{store}: its plan is gone; convert again")
    try:
        outcome = _make(plan, number)
    except _SourceError as error:
        fractional = isinstance(error.cause, NotWhole)
        outcome = Outcome(None, {}, error.source, str(error.cause), fractional)
    write_whole(_outcome_file(plan, number), json.dumps(asdict(outcome)).encode())
    return outcome


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


def _make(plan: Plan, number: int) -> Outcome:
    name, parts = plan.names[number], plan.shards[number]
    place = shard_folder(plan.store, name)
    for left in (place, place.with_name(name + TEMPORARY)):
        if left.exists():  # of a process that was killed
            shutil.rmtree(left)
    amended = {each.source: each for each in amendments(plan)}
    parts = [part for part in parts if part.source not in amended or not amended[part.source].left_out]
    found = [_amended(plan.inspections[part.source - plan.first], amended.get(part.source)) for part in parts]
    fractional = any(each.kind != UMI for each in found)
    writer = ShardWriter(plan.store, name, np.load(plan.folder / HASHES), fractional=fractional)
    edges = PieceWriter(piece_folder(plan, name), plan.graphs)
    tables, cells = [to_table(tidy(pd.DataFrame()), plan.obs)], dict[int, int]()
    try:
        for part, inspection in zip(parts, found, strict=True):
            with _reading(part.source):
                before = writer.cells
                tables.append(_add(plan, part, inspection, writer, edges))
                cells[part.source] = cells.get(part.source, 0) + writer.cells - before
        record = writer.finish(pa.concat_tables(tables).unify_dictionaries().combine_chunks())
        return Outcome(record, cells, pieces=edges.finish())
    except BaseException:
        writer.abandon()
        edges.abandon()
        raise


def _add(plan: Plan, part: Part, found: Inspection, writer: ShardWriter, edges: PieceWriter) -> pa.Table:
    """Write one part's rows; return their metadata."""
    options = found.sample.options
    with options.open(found.path, found.settled, plan.store) as source:
        check_unchanged(found)
        obs = tidy(source.obs())
        keep, _ = kept_cells(source.obs(), options, str(found.path))
        kept = np.zeros(len(obs), bool)
        rows, done = part.start + np.flatnonzero(keep[part.start : part.stop]), 0
        numbers = plan.numbers(part.source - plan.first)
        for indptr, genes, values in source.canonical(numbers, plan.genes, start=part.start, stop=part.stop, keep=keep):
            own, done = rows[done : done + len(indptr) - 1], done + len(indptr) - 1
            enough = _enough(indptr, values, options.min_counts, options.min_genes)
            if not enough.all():
                indptr, genes, values = _filtered(indptr, genes, values, enough)
            kept[own[enough]] = True
            writer.add(indptr, genes, values, part.source)
        edges.add(source.graphs(list(plan.graphs)), part.start, kept[part.start : part.stop])
        check_unchanged(found)
    for name, text in found.sample.obs.items():
        obs[name] = pd.Categorical.from_codes(np.zeros(len(obs), np.int64), dtype=pd.CategoricalDtype([text]))
    return to_table(obs[kept], plan.obs)


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


def piece_folder(plan: Plan, shard: str) -> Path:
    """Return where the edges of a shard's cells are set aside."""
    return plan.folder / f"edges-{shard}"


def _outcome_file(plan: Plan, number: int) -> Path:
    return plan.folder / f"outcome-{plan.names[number]}.json"


def outcome_of(plan: Plan, number: int) -> Outcome | None:
    """Return what became of a shard; None if it has to be made, or made again because it is not as it was written."""
    try:
        content = json.loads(_outcome_file(plan, number).read_bytes())
        cells = {int(source): int(n) for source, n in content["cells"].items()}
        if content["record"] is None:
            return Outcome(None, cells, content["source"], content["reason"], content["fractional"])
        record, pieces = ShardRecord.from_json(content["record"]), files_from_json(content["pieces"])
        places = {shard_folder(plan.store, record.name): record.files, piece_folder(plan, record.name): pieces}
        whole = all((place / n).stat().st_size == f.bytes for place, files in places.items() for n, f in files.items())
        return Outcome(record, cells, pieces=pieces) if whole else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def amendments(plan: Plan) -> list[Amendment]:
    """Return what turned out of the sources so far, by number of the source."""
    found = []
    for path in sorted(plan.folder.glob("amended-*.json")):
        content = json.loads(path.read_bytes())
        found.append(Amendment(content["source"], content["left_out"]))
    return sorted(found, key=lambda each: each.source)


def amend(plan: Plan, new: Iterable[Amendment]) -> None:
    """Write down what turned out of sources; the shards that hold some of them will be made again."""
    new = list(new)
    for each in new:
        write_whole(plan.folder / f"amended-{each.source}.json", json.dumps(asdict(each)).encode())
    changed = {each.source for each in new}
    for number, parts in enumerate(plan.shards):
        if changed & {part.source for part in parts}:
            _outcome_file(plan, number).unlink(missing_ok=True)
