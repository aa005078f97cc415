# SPDX-License-Identifier: Apache-2.0
"""Small shards merged into full ones as a new generation: cells keep their number and order, genes theirs.

Readers of earlier generations keep their shards until those are pruned. Killed anywhere, the store is the old
generation or the new one, and a shard that was finished is not made again.
"""

import json
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa

from megacell.core.errors import DataError, KilledError, UsageError
from megacell.core.files import TEMPORARY, write_whole
from megacell.core.progress import Progress
from megacell.store.conversion.parts import refuse_running_parts
from megacell.store.conversion.plan import load_plan, remove_unfinished, shard_folder
from megacell.store.conversion.target import naming_disk, sweep, sweeping
from megacell.store.conversion.warm_up import prepare
from megacell.store.format.blocks import ROWS, cut_blocks
from megacell.store.format.gene_table import GeneTable
from megacell.store.format.links import refuse_links
from megacell.store.format.lock import writing
from megacell.store.format.manifest import FileRecord, Manifest, ObsColumn, ShardRecord, generation_name
from megacell.store.format.obs import INDEX, OBS_ROWS, from_table
from megacell.store.format.shard import OBS, SHARD_BYTES, ShardWriter
from megacell.store.format.tables import open_table
from megacell.store.format.verify import damage_of
from megacell.store.maintain.pruning import OLDER_THAN, needed_files, outdated, own_bytes, reading_of
from megacell.store.processes.executors import MEMORY, Died, executor, fitting_workers
from megacell.store.read.mapped_shard import Shard, map_cells

Array = np.ndarray[Any, Any]
Group = Sequence[ShardRecord]


@dataclass(frozen=True)
class CompactionReport:
    """What compacting did.

    Attributes
    ----------
    path : Path
        The store.
    generation : int
        The store's now; as before where there was nothing to do.
    merged, shards : int
        Shards that were merged into others, and that the generation has.
    pruned : list of int
        Earlier generations that can no longer be opened.
    freed, kept : int
        Bytes of shards and graphs that were removed, and that earlier generations still hold for themselves.
    """

    path: Path
    generation: int
    merged: int
    shards: int
    pruned: list[int]
    freed: int
    kept: int


def compact(
    path: str | os.PathLike[str],
    *,
    prune: bool = False,
    older_than: float = OLDER_THAN,
    workers: int | None = 1,
    memory: int = MEMORY,
    shard_bytes: int = SHARD_BYTES,
    progress: bool = False,
    log: Callable[[str], None] | None = None,
) -> CompactionReport:
    """Merge shards that follow each other, and hold counts alike, into full ones; let go of earlier generations.

    Parameters
    ----------
    path : path-like
        The store.
    prune : bool
        Remove shards and graphs that only earlier generations name; those can no longer be opened.
    older_than : float
        Hours; a generation that was replaced less long ago is not pruned.
    workers : int, optional
        Processes, each merging into one shard at a time; None for one a core.
    memory : int
        Bytes that all processes together may take.
    shard_bytes : int
        Size at which a shard is full.
    progress : bool
        Show a progress bar if the terminal can, else a line now and then.
    log : callable, optional
        Receives one line a step.

    Returns
    -------
    CompactionReport

    Raises
    ------
    DataError
        A store that is damaged, being written, or in which a conversion was not finished.
    UsageError
        A number of workers, of bytes or hours that cannot be.
    """
    store, log = Path(path), log or (lambda _line: None)
    if older_than < 0:
        raise UsageError(f"--older-than {older_than:g}: give hours, 0 or more")
    fitting = fitting_workers(workers, memory)
    refuse_links(store)
    Manifest.open(store)  # before a lock is put into a folder that is no store
    with naming_disk(store), writing(store), Progress(show=progress) as bar, sweeping(store):
        manifest = Manifest.open(store)
        _refuse_unfinished(store, manifest)
        groups = grouped(manifest.shards, shard_bytes)
        shards = _merge(store, manifest, groups, shard_bytes, fitting, bar)
        merged = len(manifest.shards) - sum(len(group) == 1 for group in groups)
        if merged:
            log(f"merged {merged} shards into {sum(len(group) > 1 for group in groups)}")
        new = replace(manifest, shards=tuple(shards))
        earlier = reading_of(store, manifest)
        gone = outdated(store, earlier, new, older_than) if prune else set()
        before, new_earlier = own_bytes(earlier, new), {n: m for n, m in earlier.items() if n not in gone}
        if merged or gone:
            new = _commit(store, manifest, new, new_earlier)
            log(f"committed generation {new.generation} of {store}: {len(shards)} shard{'s' * (len(shards) != 1)}")
        sweep(store)
    kept = own_bytes(new_earlier, new)
    pruned = sorted(earlier[name].generation for name in gone)
    return CompactionReport(store, new.generation, merged, len(shards), pruned, before - kept, kept)


def _refuse_unfinished(store: Path, manifest: Manifest) -> None:
    """Raise where a conversion's shards would be lost."""
    refuse_running_parts(store)
    plan = load_plan(store)
    if plan is not None and plan.first == len(manifest.sources):
        fix = f"run the same again, with --finish if it was in parts, or delete {plan.folder}"
        raise DataError(f"{store}: a conversion was not finished here; {fix}")


def grouped(shards: Iterable[ShardRecord], shard_bytes: int = SHARD_BYTES) -> list[list[ShardRecord]]:
    """Return shards in their order, those together that fit into one and hold whole counts, or fractions, alike."""
    groups: list[list[ShardRecord]] = []
    filled, alike = 0, False
    for shard in shards:
        size, fractional = sum(file.bytes for file in shard.files.values()), _is_fractional(shard)
        if not groups or filled + size > shard_bytes or alike != fractional:
            groups.append([])
            filled, alike = 0, fractional
        groups[-1].append(shard)
        filled += size
    return groups


def _is_fractional(shard: ShardRecord) -> bool:
    return "counts.npy" in shard.files and shard.files["counts.npy"].dtype == "float32"


def _merge(
    store: Path, manifest: Manifest, groups: Sequence[Group], shard_bytes: int, workers: int, bar: Progress
) -> list[ShardRecord]:
    """Return the shards of the generation to come; those that a killed run of the same kind finished are taken."""
    several = [group for group in groups if len(group) > 1]
    if not several:
        return list(manifest.shards)
    folder = store / f"compaction-{manifest.digest}-{shard_bytes}{TEMPORARY}"
    if folder.is_symlink() or not folder.exists():
        sweep(store)
        folder.mkdir()
    names = [name for name, _ in zip(manifest.new_shards(), several, strict=False)]
    with executor(min(workers, len(several)), prepare=prepare) as run:
        same = [[each] * len(several) for each in (store, folder, manifest.genes_file, manifest.obs)]
        made = []
        for record in bar.steps("merging shards", run.map(merge_shards, *same, several, names), len(several)):
            if isinstance(record, Died):
                raise KilledError(f"{store}: a process that merged shards died ({record.name}); run it again")
            made.append(record)
    ready = iter(made)
    return [next(ready) if len(group) > 1 else group[0] for group in groups]


def merge_shards(
    store: Path, folder: Path, genes_file: str, schema: Sequence[ObsColumn], group: Group, name: str
) -> ShardRecord:
    """Make one shard of several, unless it is there: what each process runs. `folder` remembers what was made."""
    place, done = shard_folder(store, name), folder / f"{name}.json"
    try:
        made = ShardRecord.from_json(json.loads(done.read_bytes()))
        if all((place / file).stat().st_size == record.bytes for file, record in made.files.items()):
            return made
    except (OSError, ValueError, KeyError, TypeError):
        pass  # not made yet
    remove_unfinished(store, name)
    hashes = GeneTable.read(store / genes_file).hashes()
    shards = [_open_whole(store, record) for record in group]
    if all(shard.indices.dtype == np.uint16 for shard in shards):
        hashes = hashes[: 1 << 16]  # genes that were added since need no wider numbers here
    writer = ShardWriter(store, name, hashes, schema, fractional=_is_fractional(group[0]))
    try:
        for shard in shards:
            _add(shard, writer, len(hashes), schema)
        record = writer.finish()
    except BaseException:
        writer.abandon()
        raise
    write_whole(done, json.dumps(asdict(record)).encode())
    return record


def _open_whole(store: Path, record: ShardRecord) -> Shard:
    """Map a shard all of whose bytes are as they were written: a copy of damage would bear a good checksum."""
    folder = shard_folder(store, record.name)
    for file, known in record.files.items():
        if damage := damage_of(folder / file, known):
            raise DataError(f"{folder / file}: {damage}; restore it from a copy, then compact")
    shard = Shard(store, record)
    if shard.indptr[0] != 0 or (np.diff(shard.indptr) < 0).any() or shard.indptr[-1] != record.values:
        raise DataError(f"{folder}: indptr.npy does not fit the values; restore it from a copy, then compact")
    return shard


def _add(shard: Shard, writer: ShardWriter, genes: int, schema: Sequence[ObsColumn]) -> None:
    """Append a shard's cells, and their metadata as the store has them now."""
    store = shard.folder.parent.parent
    hashes, panels = (map_cells(store, shard.record, name) for name in ("cell_hash.npy", "panels.npy"))
    for first, indptr, numbers, counts in cut_blocks(0, shard.indptr, shard.indices, shard.counts, ROWS):
        cells = slice(first, first + len(indptr) - 1)
        try:
            values = _exact(shard, int(shard.indptr[first]), counts)
        except (IndexError, ValueError):  # positions that do not ascend lead anywhere
            raise DataError(f"{shard.folder}: its overflow files do not fit the counts; convert again") from None
        whole = int(numbers.max(initial=0)) < genes
        if not whole or not np.array_equal(writer.add(indptr, numbers, values, panels[cells]), hashes[cells]):
            raise DataError(f"{shard.folder}: cells from row {first} on are not those that were hashed; convert again")
    with open_table(shard.folder / OBS, 2, shard.record.cells) as file:
        for batch in file.iter_batches(OBS_ROWS):
            table = pa.Table.from_batches([batch])
            columns = {column.name: from_table(table, column) for column in schema}
            names = np.array(table.column(INDEX).to_pylist(), object)
            writer.add_obs(pd.DataFrame(columns, index=range(len(names))).set_axis(names, axis=0))


def _exact(shard: Shard, start: int, counts: Array) -> Array:
    """Return counts, as they are stored from position `start` on, in a type that holds them exactly."""
    if counts.dtype == np.float32:
        return counts
    values = counts.astype(np.float64)
    low, high = np.searchsorted(shard.positions, [start, start + len(counts)])
    values[shard.positions[low:high] - start] = shard.large[low:high]
    return values


def _commit(store: Path, manifest: Manifest, new: Manifest, earlier: dict[str, Manifest]) -> Manifest:
    kept = generation_name(manifest.generation)
    files = needed_files({**manifest.files, kept: FileRecord.of(store / kept)}, earlier, new)
    new = replace(new, generation=manifest.generation + 1, files=files, earlier=tuple(earlier), digest="")
    new.commit(store)
    return new
