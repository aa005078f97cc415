# SPDX-License-Identifier: Apache-2.0
"""What became of each shard of a plan, and what turned out of its sources: written down beside the plan.

An outcome says what it was made for: a process that outlives its killed conversion may still write one, and the
next conversion must not take it for its own.
"""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from megacell.core.files import write_whole
from megacell.store.conversion.plan import Plan, shard_folder
from megacell.store.format.manifest import FileRecord, ShardRecord, files_from_json

_AMENDED = "amended.json"


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


def amendments(plan: Plan) -> dict[int, Amendment]:
    """Return what turned out of the sources so far, by number of the source."""
    try:
        content = json.loads((plan.folder / _AMENDED).read_bytes())
    except FileNotFoundError:
        return {}
    return {source: Amendment(source, left_out) for source, left_out in content}


def amend(plan: Plan, new: Iterable[Amendment]) -> None:
    """Write down what turned out of sources; the shards that hold some of them will be made again."""
    known = amendments(plan) | {each.source: each for each in new}
    content = [[source, known[source].left_out] for source in sorted(known)]
    write_whole(plan.folder / _AMENDED, json.dumps(content).encode())


def note_reading(plan: Plan, number: int, source: int | None) -> None:
    """Write down which source of a shard is being read, None for none, for the case that the process dies of it."""
    path = plan.folder / f"reading-{plan.names[number]}"
    if source is None:
        path.unlink(missing_ok=True)
    else:
        path.write_text(str(source))


def source_read(plan: Plan, number: int) -> int | None:
    """Return the source that was being read when the process that made a shard died."""
    try:
        return int((plan.folder / f"reading-{plan.names[number]}").read_text())
    except (FileNotFoundError, ValueError):
        return None


def write_outcome(plan: Plan, number: int, amended: dict[int, Amendment], outcome: Outcome) -> None:
    """Write down what became of a shard that was made with these amendments."""
    content = {"made_for": _made_for(plan, number, amended), **asdict(outcome)}
    write_whole(_path(plan, number), json.dumps(content).encode())


def outcome_of(plan: Plan, number: int, amended: dict[int, Amendment]) -> Outcome | None:
    """Return what became of a shard; None if it has to be made, or made again because it is not as it was written."""
    try:
        content = json.loads(_path(plan, number).read_bytes())
        if content["made_for"] != _made_for(plan, number, amended):
            return None
        cells = {int(source): int(n) for source, n in content["cells"].items()}
        if content["record"] is None:
            return Outcome(None, cells, content["source"], content["reason"], content["fractional"])
        record, pieces = ShardRecord.from_json(content["record"]), files_from_json(content["pieces"])
        places = {shard_folder(plan.store, record.name): record.files, piece_folder(plan, record.name): pieces}
        whole = all((place / n).stat().st_size == f.bytes for place, files in places.items() for n, f in files.items())
        return Outcome(record, cells, pieces=pieces) if whole else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def piece_folder(plan: Plan, shard: str) -> Path:
    """Return where the edges of a shard's cells are set aside."""
    return plan.folder / f"edges-{shard}"


def _path(plan: Plan, number: int) -> Path:
    return plan.folder / f"outcome-{plan.names[number]}.json"


def _made_for(plan: Plan, number: int, amended: dict[int, Amendment]) -> list[Any]:
    own = sorted({part.source for part in plan.shards[number]} & set(amended))
    return [plan.request, [[source, amended[source].left_out] for source in own]]
