# SPDX-License-Identifier: Apache-2.0
"""From files to a store: plan → tasks → commit → report.

Killed anywhere, the store is the old generation or the new one: shards and tables are written beside and
renamed, and none of them exists for a reader until the manifest, renamed last, names it.
"""

import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from megacell.store.counts import UMI
from megacell.store.duplicates import Duplicates, find_duplicates
from megacell.store.errors import DataError, UsageError
from megacell.store.genes import GeneTable
from megacell.store.manifest import FileRecord, Manifest, ObsColumn, ShardRecord, Source, generation_name
from megacell.store.obs import tidy, to_table
from megacell.store.panels import Panels
from megacell.store.plan import (
    Inspection,
    Options,
    Part,
    Plan,
    as_fractional,
    check_unchanged,
    find_files,
    hash_files,
    inspect,
    kept_cells,
    make_plan,
    refuse,
)
from megacell.store.progress import Progress
from megacell.store.shard import FOLDER, ShardWriter, map_array
from megacell.store.sources.h5ad import NotWhole
from megacell.store.sources.h5ad_counts import Settled
from megacell.store.target import check_target, open_target, sweep

SHARD_BYTES = 2 << 30


@dataclass(frozen=True)
class ConversionReport:
    """What a conversion did, or, for a dry run, would do.

    Attributes
    ----------
    path : Path
        The store.
    generation : int
        0 for a dry run.
    cells, genes : int
        Of the whole store.
    inspections : list of Inspection
        What was found of each file, in the order of the sources.
    sources : list of Source
        The sources that this conversion added.
    duplicates : list of Duplicates
        Exact copies of cells, by pair of sources, that this conversion brought.
    """

    path: Path
    generation: int
    cells: int
    genes: int
    inspections: list[Inspection]
    sources: list[Source] = field(default_factory=list)
    duplicates: list[Duplicates] = field(default_factory=list)


@dataclass(frozen=True)
class Task:
    """One shard to make: all that a process needs for it."""

    store: Path
    name: str
    parts: list[tuple[Part, Path, Settled, np.ndarray[Any, Any]]]  # rows, file, its counts, gene numbers
    gene_hashes: np.ndarray[Any, Any]
    obs: list[ObsColumn]
    options: Options


def convert(
    sources: str | os.PathLike[str] | Iterable[str | os.PathLike[str]],
    out: str | os.PathLike[str],
    *,
    append: bool = False,
    dry_run: bool = False,
    counts: str = "auto",
    gene_ids: str = "auto",
    species: str | None = None,
    allow_subset: bool = False,
    allow_length_normalised: bool = False,
    all_cells: bool = False,
    workers: int = 1,
    shard_bytes: int = SHARD_BYTES,
    progress: bool = False,
    log: Callable[[str], None] | None = None,
) -> ConversionReport:
    """Convert .h5ad files to a cell store.

    Parameters
    ----------
    sources : path or paths
        .h5ad files, or folders that hold some.
    out : path
        The store: new, or with `append` one that is there.
    append : bool
        Add the files to a store as its next generation; readers of the current one are not disturbed.
    dry_run : bool
        Look at the files only; refused ones are in the report rather than raised.
    counts : str
        "auto", "X", "raw", "layer:NAME", or "recover" for whole counts out of log1p values.
    gene_ids : str
        "auto" (found by content), "index", or a column of var.
    species : str, optional
        The one species of the store: "human" unless given.
    allow_subset : bool
        Take files that measure under 10,000 genes.
    allow_length_normalised : bool
        Take TPM.
    all_cells : bool
        Keep cells with ``is_primary_data == False``.
    workers : int
        Processes; each makes one shard at a time.
    shard_bytes : int
        Size at which a shard is full.
    progress : bool
        Show a progress bar if the terminal can.
    log : callable, optional
        Receives one line a step.

    Returns
    -------
    ConversionReport

    Raises
    ------
    DataError
        A file that is refused or changes meanwhile, or a store that is damaged or being written.
    UsageError
        Paths or options that do not fit.
    """
    options = Options(counts, gene_ids, species, allow_subset, allow_length_normalised, all_cells)
    say = log or (lambda _line: None)
    store = Path(out)
    before = check_target(store, append=append)
    if before is not None:
        if species not in (None, before.species):
            raise UsageError(f"{store}: holds {before.species} cells, not {species}; give another --out")
        options = Options(counts, gene_ids, before.species, allow_subset, allow_length_normalised, all_cells)
    files = find_files(sources)
    with Progress(show=progress) as bar:
        inspections = [inspect(path, options) for path in bar.steps("looking at files", files)]
        if dry_run:
            return ConversionReport(store, 0, sum(i.cells for i in inspections if not i.refused), 0, inspections)
        refuse(inspections)
        say(f"looked at {len(files)} file{'s' * (len(files) != 1)}: {sum(i.cells for i in inspections):,} cells")
        with open_target(store, append=append) as before:
            hash_files(inspections, before, bar.say)
            manifest, plan = _make(store, before, inspections, options, workers, shard_bytes, bar, say)
    report = _report(store, manifest, plan)
    say(f"committed generation {manifest.generation} of {store}: {manifest.cells:,} cells, {manifest.genes:,} genes")
    return report


def _make(
    store: Path,
    before: Manifest | None,
    inspections: list[Inspection],
    options: Options,
    workers: int,
    shard_bytes: int,
    bar: Progress,
    say: Callable[[str], None],
) -> tuple[Manifest, Plan]:
    """Plan, write and commit; on any error nothing of it stays."""
    while True:
        genes = GeneTable.read(store / before.genes_file) if before else GeneTable()
        panels = Panels.read(store / before.panels_file) if before else Panels()
        plan = make_plan(inspections, before, genes, panels, shard_bytes)
        if not sum(source.cells for source in plan.sources):
            raise DataError(
                f"{inspections[0].path}: no cell left to convert; --all-cells keeps those that are not primary"
            )
        try:
            shards = _run(_tasks(store, plan, options), workers, bar)
            manifest = _commit(store, plan, shards)
        except NotWhole as error:
            sweep(store)
            (wrong,) = (i for i, found in enumerate(inspections) if str(error).startswith(f"{found.path}: "))
            inspections[wrong] = as_fractional(inspections[wrong])
            say(f"{inspections[wrong].path}: fractions among whole counts, starting again with counts as fractional")
        except OSError as error:
            sweep(store)
            where = error.filename or store
            raise DataError(f"{where}: {error.strerror or error}; see to room and rights, then run it again") from error
        except BaseException:
            sweep(store)
            raise
        else:
            say(f"wrote {len(shards)} shard{'s' * (len(shards) != 1)}, {sum(s.values for s in shards):,} values")
            return manifest, plan


def _tasks(store: Path, plan: Plan, options: Options) -> list[Task]:
    first = len(plan.before.sources) if plan.before else 0
    taken = {shard.name for shard in plan.before.shards} if plan.before else set()
    names = (name for number in range(len(taken) + len(plan.shards) + 1) if (name := f"{number:05d}") not in taken)
    hashes = plan.genes.hashes()
    tasks = []
    for parts, name in zip(plan.shards, names, strict=False):
        own = []
        for part in parts:
            found = plan.inspections[part.source - first]
            assert found.settled is not None
            own.append((part, found.path, found.settled, plan.numbers[part.source - first]))
        tasks.append(Task(store, name, own, hashes, plan.obs, options))
    return tasks


def _run(tasks: Sequence[Task], workers: int, bar: Progress) -> list[ShardRecord]:
    """Make the shards, here or in several processes."""
    cells = sum(part.stop - part.start for task in tasks for part, *_ in task.parts)
    bar.start("converting cells", cells)
    if workers <= 1 or len(tasks) == 1:
        return [make_shard(task, bar.advance) for task in tasks]
    shards = []
    with ProcessPoolExecutor(min(workers, len(tasks)), mp_context=get_context("spawn")) as pool:
        for task, shard in zip(tasks, pool.map(make_shard, tasks), strict=True):
            bar.advance(sum(part.stop - part.start for part, *_ in task.parts))
            shards.append(shard)
    return shards


def make_shard(task: Task, advance: Callable[[int], None] = lambda _cells: None) -> ShardRecord:
    """Write one shard and return its record."""
    fractional = any(settled.kind != UMI for _, _, settled, _ in task.parts)
    writer = ShardWriter(task.store, task.name, task.gene_hashes, fractional=fractional)
    tables = []
    try:
        for part, path, settled, numbers in task.parts:
            with task.options.open(path, settled, task.store) as source:
                obs = source.obs()
                keep = kept_cells(obs, task.options)
                for block in source.canonical(
                    numbers, len(task.gene_hashes), start=part.start, stop=part.stop, keep=keep
                ):
                    writer.add(*block, part.source)
                    advance(len(block[0]) - 1)
            kept = keep.copy()
            kept[: part.start] = kept[part.stop :] = False
            tables.append(to_table(tidy(obs)[kept], task.obs))
        return writer.finish(pa.concat_tables(tables).unify_dictionaries().combine_chunks())
    except BaseException:
        writer.abandon()
        raise


def _commit(store: Path, plan: Plan, shards: list[ShardRecord]) -> Manifest:
    """Write the tables of the generation and then its manifest."""
    before = plan.before
    generation = before.generation + 1 if before else 1
    genes_file, panels_file = f"genes-{generation}.parquet", f"panels-{generation}.parquet"
    plan.genes.write(store / genes_file)
    plan.panels.write(store / panels_file)
    files = {name: FileRecord.of(store / name) for name in (genes_file, panels_file)}
    earlier: tuple[str, ...] = ()
    if before:
        kept = generation_name(before.generation)
        files = {**before.files, kept: FileRecord.of(store / kept), **files}
        earlier = (*before.earlier, kept)
    all_shards = (*(before.shards if before else ()), *shards)
    manifest = Manifest(
        generation=generation,
        species=plan.species,
        cells=sum(shard.cells for shard in all_shards),
        genes=len(plan.genes),
        values=sum(shard.values for shard in all_shards),
        files=files,
        genes_file=genes_file,
        panels_file=panels_file,
        shards=all_shards,
        sources=(*(before.sources if before else ()), *plan.sources),
        obs=tuple(plan.obs),
        earlier=earlier,
        neighbours=before.neighbours if before else {},
    )
    for found in plan.inspections:
        check_unchanged(found)
    manifest.commit(store)
    return manifest


def _report(store: Path, manifest: Manifest, plan: Plan) -> ConversionReport:
    columns: dict[str, list[np.ndarray[Any, Any]]] = {"cell_hash.npy": [], "panels.npy": []}
    for shard in manifest.shards:
        for name, arrays in columns.items():
            arrays.append(map_array(store / FOLDER / shard.name / name, shard.files.get(name)))
    hashes, source_of = (np.concatenate(arrays) for arrays in columns.values())
    first_new = len(manifest.sources) - len(plan.sources)
    found = find_duplicates(hashes, source_of, [source.name for source in manifest.sources], first_new)
    return ConversionReport(
        store, manifest.generation, manifest.cells, manifest.genes, plan.inspections, plan.sources, found
    )
