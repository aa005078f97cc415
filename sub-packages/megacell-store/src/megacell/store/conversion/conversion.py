# SPDX-License-Identifier: Apache-2.0
"""From files to a store: plan → tasks → commit → report.

Killed anywhere, the store is the old generation or the new one: shards and tables are written beside and
renamed, and none of them exists for a reader until the manifest, renamed last, names it. What a killed conversion
finished is kept for the next one of the same request.
"""

import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from megacell.core.errors import DataError, UsageError
from megacell.core.progress import Progress
from megacell.store.conversion.graph_pieces import check_names
from megacell.store.conversion.inspection import (
    SKIP_BAD,
    Inspection,
    hashes_of,
    inspect,
    refuse,
    refuse_absent_graphs,
    refuse_repeated,
)
from megacell.store.conversion.options import Options, Sample, read_sheet
from megacell.store.conversion.outcomes import Amendment, Outcome, amend, amendments, outcome_of
from megacell.store.conversion.parts import PART_LOCK, part_plan, refuse_running_parts, request_hash
from megacell.store.conversion.plan import PLAN, Plan, load_plan, make_plan
from megacell.store.conversion.progress import watching
from megacell.store.conversion.publish import publish
from megacell.store.conversion.target import check_target, naming_disk, open_target, sweep, sweeping
from megacell.store.conversion.tasks import attempt, blame, ended_by
from megacell.store.conversion.warm_up import prepare
from megacell.store.format.lock import writing
from megacell.store.format.manifest import Manifest, Source
from megacell.store.format.obs import Schema
from megacell.store.format.shard import SHARD_BYTES
from megacell.store.processes.executors import MEMORY, Died, executor, fitting_workers
from megacell.store.read.duplicates import Duplicates, duplicates_of
from megacell.store.sources.registry import find_sources
from megacell.store.sources.scdl import count_blocks, is_scdl

_SMALL = 50_000_000  # values that one process writes in less time than others take to start


@dataclass(frozen=True)
class ConversionReport:
    """What a conversion did, or, for a dry run, would do.

    Attributes
    ----------
    path : Path
        The store.
    generation : int
        0 for a dry run, or for one part of several.
    cells, genes : int
        Of the whole store; of a part, the cells that it made.
    inspections : list of Inspection
        What was found of each file, in the order given; of a conversion, of those that were taken.
    sources : list of Source
        The sources that this conversion added.
    duplicates : list of Duplicates
        Exact copies of cells, by pair of sources, that this conversion brought.
    left_out : list of str
        Why each file that is not in the store is not.
    """

    path: Path
    generation: int
    cells: int
    genes: int
    inspections: list[Inspection]
    sources: list[Source] = field(default_factory=list)
    duplicates: list[Duplicates] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)


def convert(
    sources: str | os.PathLike[str] | Iterable[str | os.PathLike[str]],
    out: str | os.PathLike[str],
    *,
    sheet: str | os.PathLike[str] | None = None,
    append: bool = False,
    dry_run: bool = False,
    counts: str = "auto",
    gene_ids: str = "auto",
    id_map: str | os.PathLike[str] | None = None,
    species: str | None = None,
    where: str | None = None,
    min_counts: float = 0,
    min_genes: int = 0,
    allow_subset: bool = False,
    allow_length_normalised: bool = False,
    allow_low_counts: bool = False,
    all_cells: bool = False,
    neighbours: str | Iterable[str] = (),
    skip_bad: bool = False,
    workers: int | None = 1,
    memory: int = MEMORY,
    scheduler: str | None = None,
    part: tuple[int, int] | None = None,
    finish: bool = False,
    shard_bytes: int = SHARD_BYTES,
    progress: bool = False,
    log: Callable[[str], None] | None = None,
) -> ConversionReport:
    """Convert files of cells to a cell store.

    Parameters
    ----------
    sources : path or paths
        Files (.h5ad, .h5mu, .loom, 10x .h5), folders that are sources (Zarr, 10x .mtx) or hold some.
    out : path
        The store: new, or with `append` one that is there.
    sheet : path, optional
        CSV of further files with what holds for each of them alone (`read_sheet`).
    append : bool
        Add the files to a store as its next generation; readers of the current one are not disturbed.
    dry_run : bool
        Look at the files only; refused ones are in the report rather than raised.
    counts : str
        "auto", "X", "raw", "layer:NAME", "layers:A+B" for a sum, or "recover" for whole counts out of log1p values.
    gene_ids : str
        "auto" (found by content), "index", or a column of var.
    id_map : path, optional
        CSV or TSV of two columns: what files name a gene, and its id.
    species : str, optional
        The one species of the store: "human" unless given.
    where : str, optional
        Keep the cells for which this query of their metadata holds.
    min_counts, min_genes : number
        Keep the cells with at least so many counts, and genes with a count.
    allow_subset : bool
        Take files that measure under 10,000 genes.
    allow_length_normalised : bool
        Take TPM.
    allow_low_counts : bool
        Take files with a median under 200 counts a cell.
    all_cells : bool
        Keep cells with ``is_primary_data`` or ``filter_pass`` False.
    neighbours : str or several
        Graphs between cells to keep: keys of obsp; of an archive of bionemo-scdl, what its one graph shall be called.
    skip_bad : bool
        Make the store of the good files where some are refused; the report says which were left out.
    workers : int, optional
        Processes, each making a shard at a time; None for one a core, or this one alone for little data.
        Scripts that ask for several need the usual ``if __name__ == "__main__"``.
    memory : int
        Bytes that all processes together may take; fewer are started where so many would not fit.
    scheduler : str, optional
        Address of a Dask scheduler, whose workers see the same files and do the work instead.
    part : (int, int), optional
        Make only part i (from 1) of n: for many machines at once that share a file system. Commits nothing.
    finish : bool
        Commit what the parts made, and make what they did not.
    shard_bytes : int
        Size at which a shard is full; little data fill smaller ones, so that several processes find work.
    progress : bool
        Show a progress bar if the terminal can, else a line now and then.
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
    store = Path(out)
    again = append or (finish and (store / "manifest.json").exists())
    before = check_target(store, append=again)
    if before is not None and species not in (None, before.species):
        raise UsageError(f"{store}: holds {before.species} cells, not {species}; give another --out")
    options = Options(
        counts=counts,
        gene_ids=gene_ids,
        species=before.species if before else species,
        allow_subset=allow_subset,
        allow_length_normalised=allow_length_normalised,
        allow_low_counts=allow_low_counts,
        all_cells=all_cells,
        id_map=str(Path(id_map).absolute()) if id_map else None,
        where=where,
        min_counts=min_counts,
        min_genes=min_genes,
        neighbours=check_names(neighbours),
    )
    samples = _samples(sources, sheet, options)
    job = _Job(store, again, samples, skip_bad, workers, memory, scheduler, shard_bytes, log or (lambda _line: None))
    with Progress(show=progress) as bar:
        if dry_run:
            return job.inspect(bar)
        return job.run(bar, part)


def _samples(
    sources: str | os.PathLike[str] | Iterable[str | os.PathLike[str]],
    sheet: str | os.PathLike[str] | None,
    options: Options,
) -> list[Sample]:
    """Return the files given and those of the sheet; what a sheet says of a file given holds for it."""
    given = [sources] if isinstance(sources, str | os.PathLike) else list(sources)
    of_sheet = read_sheet(sheet, options) if sheet is not None else []
    plain = [Sample(path, options) for path in find_sources(given)] if given or not of_sheet else []
    listed = {sample.path.resolve() for sample in of_sheet}
    if len(listed) < len(of_sheet):
        raise UsageError(f"{sheet}: names a file twice; leave one line out")
    samples = [sample for sample in plain if sample.path.resolve() not in listed] + of_sheet
    return [each for sample in samples for each in _blocks(sample)]


def _blocks(sample: Sample) -> list[Sample]:
    """Return an archive of bionemo-scdl as its blocks, any other source as it is."""
    if not (sample.path.is_dir() and is_scdl(sample.path)):
        return [sample]
    blocks = range(count_blocks(sample.path))
    return [replace(sample, options=replace(sample.options, block=block)) for block in blocks]


@dataclass(frozen=True)
class _Job:
    """One conversion: what `convert` was asked for."""

    store: Path
    append: bool
    samples: list[Sample]
    skip_bad: bool
    workers: int | None
    memory: int
    scheduler: str | None
    shard_bytes: int
    log: Callable[[str], None]

    def inspect(self, bar: Progress) -> ConversionReport:
        """Inspect the files and write nothing."""
        workers = fitting_workers(self.workers, self.memory)
        with executor(workers if len(self.samples) >= 4 * workers else 1, self.scheduler, prepare) as run:
            found = list(self._found(run.map(inspect, self.samples), bar))
        refuse_absent_graphs([each for each in found if each.refused is None])
        return ConversionReport(self.store, 0, sum(i.cells for i in found if not i.refused), 0, found)

    def _found(self, looks: Iterable[Inspection | Died], bar: Progress) -> Iterator[Inspection]:
        """Yield what was found of each file; one whose reading ended a process is refused."""
        looks = bar.steps("looking at files", looks, len(self.samples))
        for sample, found in zip(self.samples, looks, strict=True):
            if isinstance(found, Died):
                found = Inspection(sample, refused=DataError(ended_by(sample.path, found.name)))
            yield found

    def run(self, bar: Progress, part: tuple[int, int] | None) -> ConversionReport:
        """Make the store, or one part of it; what the disk says against it names the place."""
        with naming_disk(self.store):
            return self.whole(bar) if part is None else self.part(bar, *part)

    def whole(self, bar: Progress) -> ConversionReport:
        """Plan, or go on with the plan of a conversion that was killed; make all shards; commit."""
        with open_target(self.store, append=self.append) as before:
            refuse_running_parts(self.store)
            with sweeping(self.store):
                plan = self._plan(before, bar)
                self._work(plan, bar)
                manifest = publish(self.store, before, plan)
            self.log(
                f"wrote {len(plan.shards)} shard{'s' * (len(plan.shards) != 1)}, {manifest.values:,} values in all"
            )
            left_out = plan.left_out + [each.left_out for each in amendments(plan).values() if each.left_out]
            sweep(self.store)
        added = list(manifest.sources[plan.first :])
        copies = duplicates_of(self.store, manifest, plan.first)
        cells, genes, generation = manifest.cells, manifest.genes, manifest.generation
        self.log(f"committed generation {generation} of {self.store}: {cells:,} cells, {genes:,} genes")
        return ConversionReport(self.store, generation, cells, genes, plan.inspections, added, copies, left_out)

    def part(self, bar: Progress, number: int, of: int) -> ConversionReport:
        """Make one part's shards of a plan that the first part to come makes."""
        if not 1 <= number <= of:
            raise UsageError(f"--part {number}/{of}: parts go from 1/{of} to {of}/{of}")

        def plan_here() -> None:
            with open_target(self.store, append=self.append) as before:
                try:
                    self._plan(before, bar)
                except Exception:  # a kill or Ctrl-C leaves what the next run goes on with
                    refuse_running_parts(self.store)
                    sweep(self.store)
                    raise

        plan = part_plan(self.store, self._request(), plan_here)
        own = list(range(number - 1, len(plan.shards), of))
        with writing(self.store, f"{PART_LOCK}{number}-of-{of}"):
            outcomes = self._run(plan, own, bar)
        failed = [outcome.reason for outcome in outcomes if outcome.record is None and not outcome.fractional]
        cells = sum(outcome.record.cells for outcome in outcomes if outcome.record)
        self.log(f"part {number} of {of}: {len(own)} of {len(plan.shards)} shards, {cells:,} cells")
        return ConversionReport(self.store, 0, cells, plan.genes, plan.inspections, left_out=plan.left_out + failed)

    def _request(self) -> str:
        before = Manifest.open(self.store) if self.append else None
        return request_hash(before, self.samples, self.shard_bytes, skip_bad=self.skip_bad)

    def _plan(self, before: Manifest | None, bar: Progress) -> Plan:
        """Return the plan of a killed conversion of the same request, or make one."""
        request = self._request()
        plan = load_plan(self.store)
        if plan is not None and plan.request == request:
            amended = amendments(plan)
            done = sum(outcome_of(plan, number, amended) is not None for number in range(len(plan.shards)))
            self.log(f"going on with what was begun: {done} of {len(plan.shards)} shards are there")
            return plan
        refuse_running_parts(self.store)
        sweep(self.store)
        (self.store / PLAN).mkdir()
        workers = fitting_workers(self.workers, self.memory)
        known = hashes_of(before)
        schema = Schema(before.obs if before else ())  # the metadata of no more than one file are held beside it
        found = []
        with executor(workers if len(self.samples) >= 4 * workers else 1, self.scheduler, prepare) as run:
            aside = [(self.store / PLAN).absolute()] * len(self.samples)
            for each in self._found(run.map(inspect, self.samples, aside), bar):
                refuse_repeated(each, known)
                schema.add(each.obs if each.refused is None else ())
                found.append(replace(each, obs=[]))
        good = [each for each in found if each.refused is None]
        if not self.skip_bad or not good:
            refuse(found)
        refuse_absent_graphs(good)
        cells = sum(each.cells for each in good)
        self.log(f"looked at {len(found)} file{'s' * (len(found) != 1)}: {cells:,} cells")
        if not cells:
            raise DataError(f"{good[0].path}: no cell left to convert; {good[0].mend_for_none}")
        left_out = [str(each.refused) for each in found if each.refused]
        return make_plan(self.store, request, before, good, left_out, schema.settled(), self.shard_bytes)

    def _work(self, plan: Plan, bar: Progress) -> None:
        """Make the shards; where a source turns out other than it looked, make those that hold it again."""
        while True:
            outcomes = self._run(plan, range(len(plan.shards)), bar)
            failed = [outcome for outcome in outcomes if outcome.record is None]
            if not failed:
                return
            bad = {each.source: each.reason for each in failed if not each.fractional}
            if bad and not self.skip_bad:
                if len(bad) == 1:
                    raise DataError(next(iter(bad.values())))
                reasons = " | ".join(bad.values())
                raise DataError(f"{len(bad)} of {len(self.samples)} files are bad ({SKIP_BAD}): {reasons}")
            if len(bad) == len(plan.sources) - sum(bool(each.left_out) for each in amendments(plan).values()):
                raise DataError(f"no good file is left: {' | '.join(bad.values())}")
            for source in {each.source for each in failed if each.fractional} - set(bad):
                path = plan.inspections[source - plan.first].path
                self.log(f"{path}: fractions among whole counts, starting it again with counts as fractional")
                amend(plan, [Amendment(source)])
            for source, reason in bad.items():
                self.log(f"left out: {reason}")
                amend(plan, [Amendment(source, reason)])

    def _run(self, plan: Plan, numbers: Iterable[int], bar: Progress) -> list[Outcome]:
        """Return what became of the shards; those that were not made yet are made."""
        amended = amendments(plan)
        outcomes = {number: outcome_of(plan, number, amended) for number in numbers}
        todo = [number for number, outcome in outcomes.items() if outcome is None]
        workers = fitting_workers(self.workers, self.memory)
        if self.workers is None and sum(found.values for found in plan.inspections) < _SMALL:
            workers = 1
        with executor(min(workers, len(todo)), self.scheduler if todo else None, prepare) as run, watching(bar, plan):
            for number, made in zip(todo, run.map(make_shard, [plan.store] * len(todo), todo), strict=True):
                outcomes[number] = blame(plan, number, made.name) if isinstance(made, Died) else made
        return [outcome for outcome in outcomes.values() if outcome is not None]


def make_shard(store: Path, number: int) -> Outcome:
    """Make one shard of a store's plan: what each process runs."""
    return attempt(store, number)
