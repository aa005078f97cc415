# SPDX-License-Identifier: Apache-2.0
"""The commit of a plan whose shards are made: tables, then the manifest."""

from dataclasses import replace
from pathlib import Path

from megacell.core.errors import DataError
from megacell.core.files import write_whole
from megacell.store.conversion.graph_joining import join_graphs
from megacell.store.conversion.inspection import check_unchanged
from megacell.store.conversion.outcomes import Outcome, amendments, outcome_of
from megacell.store.conversion.plan import GENES, PANELS, Plan
from megacell.store.format.manifest import FileRecord, GraphRecord, Manifest, ShardRecord, Source, generation_name
from megacell.store.sources.count_kinds import FRACTIONAL


def publish(store: Path, before: Manifest | None, plan: Plan) -> Manifest:
    """Write the tables of the generation and then its manifest.

    Raises
    ------
    DataError
        A shard that is not made, no cell in any, or a file that changed meanwhile.
    """
    amended = amendments(plan)
    outcomes = [outcome_of(plan, number, amended) for number in range(len(plan.shards))]
    made = [(outcome, outcome.record) for outcome in outcomes if outcome is not None and outcome.record is not None]
    if len(made) < len(outcomes):
        raise DataError(f"{store}: {len(outcomes) - len(made)} shards are not made; convert again")
    for number, found in enumerate(plan.inspections, plan.first):
        if number not in amended or not amended[number].left_out:
            check_unchanged(found)
    shards = [record for _, record in made if record.cells]
    if not shards:
        raise DataError(f"{store}: no cell passes the filters; ask for fewer --min-counts, --min-genes")
    generation = before.generation + 1 if before else 1
    genes_file, panels_file = f"genes-{generation}.parquet", f"panels-{generation}.parquet"
    for name, planned in ((genes_file, GENES), (panels_file, PANELS)):
        write_whole(store / name, (plan.folder / planned).read_bytes())
    files = {name: FileRecord.of(store / name) for name in (genes_file, panels_file)}
    outcomes_made = [outcome for outcome, record in made if record.cells]
    graphs, notes = join_graphs(store, before, plan, outcomes_made)
    sources = _sources(plan, outcomes_made, notes)
    manifest = _manifest(store, before, plan, generation, files, shards, sources, graphs)
    manifest.commit(store)
    return manifest


def _manifest(
    store: Path,
    before: Manifest | None,
    plan: Plan,
    generation: int,
    files: dict[str, FileRecord],
    shards: list[ShardRecord],
    sources: list[Source],
    graphs: dict[str, GraphRecord],
) -> Manifest:
    genes_file, panels_file = files
    earlier: tuple[str, ...] = ()
    if before:
        kept = generation_name(before.generation)
        files = {**before.files, kept: FileRecord.of(store / kept), **files}
        earlier = (*before.earlier, kept)
    all_shards = (*(before.shards if before else ()), *shards)
    return Manifest(
        generation=generation,
        species=plan.species,
        cells=sum(shard.cells for shard in all_shards),
        genes=plan.genes,
        values=sum(shard.values for shard in all_shards),
        files=files,
        genes_file=genes_file,
        panels_file=panels_file,
        shards=all_shards,
        sources=(*(before.sources if before else ()), *sources),
        obs=tuple(plan.obs),
        earlier=earlier,
        neighbours=graphs,
    )


def _sources(plan: Plan, made: list[Outcome], found: dict[int, list[str]]) -> list[Source]:
    """Return the sources' records with what only the counts, or the graphs (`found`), told."""
    cells: dict[int, int] = {}
    for outcome in made:
        for number, n in outcome.cells.items():
            cells[number] = cells.get(number, 0) + n
    amended = amendments(plan)
    sources = []
    for number, source in enumerate(plan.sources, plan.first):
        kept = cells.get(number, 0)
        notes = [*source.notes, *found.get(number, [])]
        amendment = amended.get(number)
        kind = source.kind
        if amendment is not None and amendment.left_out:
            notes.append(f"left out: {amendment.left_out}")
        elif amendment is not None:
            kind = FRACTIONAL
            notes.append("fractions among whole counts")
        if kept < source.cells and not (amendment is not None and amendment.left_out):
            notes.append(f"{source.cells - kept:,} cells with too few counts or genes skipped")
        sources.append(replace(source, kind=kind, cells=kept, notes=tuple(notes)))
    return sources
