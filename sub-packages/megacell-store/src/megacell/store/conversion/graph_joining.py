# SPDX-License-Identifier: Apache-2.0
"""The graphs of a new generation: those of the one before, and a block for each source with store-wide numbers."""

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from megacell.core.files import TEMPORARY
from megacell.store.conversion.graph_pieces import Piece
from megacell.store.conversion.outcomes import Outcome, piece_folder
from megacell.store.conversion.plan import Plan
from megacell.store.format.blocks import ROWS, cut_blocks, spool
from megacell.store.format.graph import WEIGHTS, GraphWriter, map_graph, widest_weights
from megacell.store.format.manifest import GraphRecord, Manifest

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class _Run:
    """Cells `low` up to `high` of one shard, all of one source; `first` is the store's number of the first."""

    source: int
    piece: Piece
    low: int
    high: int
    first: int


def join_graphs(
    store: Path, before: Manifest | None, plan: Plan, made: Sequence[Outcome]
) -> tuple[dict[str, GraphRecord], dict[int, list[str]]]:
    """Write the graphs that a conversion was asked for.

    Parameters
    ----------
    store : Path
    before : Manifest or None
        A graph of the same name in it is grown; others stay as they are.
    plan : Plan
    made : sequence of Outcome
        What became of the shards; none failed.

    Returns
    -------
    graphs : dict
        All of the new generation, by name in its manifest.
    notes : dict
        What to say of a source, by its number.
    """
    records, notes = dict(before.neighbours) if before else {}, dict[int, list[str]]()
    if not plan.graphs:
        return records, notes
    first, generation = (before.cells, before.generation + 1) if before else (0, 1)
    runs = _runs(plan, made, first)
    cells = runs[-1].first + runs[-1].high - runs[-1].low
    with ExitStack() as stack:
        writers = {}
        for name, weights in plan.graphs.items():
            grown = before.graphs.get(name) if before else None
            old = records.pop(grown) if grown is not None else None
            weights = widest_weights([weights, str(old.files[WEIGHTS].dtype) if old else ""])
            writers[name] = GraphWriter(store, f"{name}-{generation}", cells, weights)
            stack.callback(writers[name].abandon)
            if old is not None:
                _copy(map_graph(store, str(grown), old), writers[name])
            writers[name].skip_to(first)
        for source, own in groupby(runs, key=lambda run: run.source):
            notes[source] = _add_source(plan, list(own), writers)
        records |= {f"{name}-{generation}": writer.finish() for name, writer in writers.items()}
    return records, notes


def _runs(plan: Plan, made: Sequence[Outcome], first: int) -> list[_Run]:
    """Return the new cells in the order of the store, source by source and shard by shard."""
    runs = []
    for outcome in made:
        assert outcome.record is not None
        piece, low = Piece(piece_folder(plan, outcome.record.name), outcome.pieces), 0
        for source, cells in outcome.cells.items():
            if cells:
                runs.append(_Run(source, piece, low, low + cells, first + low))
            low += cells
        first += low
    return runs


def _copy(graph: tuple[Array, Array, Array], writer: GraphWriter) -> None:
    for _, pointers, *edges in cut_blocks(0, *graph, ROWS):
        writer.add(np.diff(pointers), *edges)


def _add_source(plan: Plan, runs: Sequence[_Run], writers: Mapping[str, GraphWriter]) -> list[str]:
    """Append one source's edges to each graph; return what to say of the edges that lead to cells left out."""
    dropped, rows_of_file = dict.fromkeys(writers, 0), plan.inspections[runs[0].source - plan.first].rows
    with tempfile.TemporaryDirectory(prefix="numbers-", suffix=TEMPORARY, dir=plan.folder) as folder:
        # by row of the file: a cell's number in the store and one, 0 for a cell left out
        numbers = spool(Path(folder) / "numbers", np.dtype(np.int64), rows_of_file)
        for run in runs:
            for low in range(run.low, run.high, ROWS):
                rows = run.piece.rows[low : min(low + ROWS, run.high)]
                numbers[rows] = run.first + 1 + np.arange(low, low + len(rows)) - run.low
        for run in runs:
            for name, writer in writers.items():
                for lengths, cells, weights, lost in _numbered(run, name, numbers):
                    writer.add(lengths, cells, weights)
                    dropped[name] += lost
        del numbers
    return [f"{name}: {n:,} edges to cells that were left out dropped" for name, n in dropped.items() if n]


def _numbered(run: _Run, name: str, numbers: Array) -> Iterator[tuple[Array, Array, Array, int]]:
    """Yield blocks of a run's edges: how many each cell has, to which cells, their weights; and how many are lost."""
    indptr, rows, weights = run.piece.graph(name)
    for _, pointers, own_rows, own_weights in cut_blocks(0, indptr[run.low : run.high + 1], rows, weights, ROWS):
        found = numbers[own_rows]
        kept = found > 0
        before = np.concatenate([np.zeros(1, np.int64), np.cumsum(kept)])  # edges kept before each
        yield np.diff(before[pointers]), found[kept] - 1, own_weights[kept], len(kept) - int(before[-1])
