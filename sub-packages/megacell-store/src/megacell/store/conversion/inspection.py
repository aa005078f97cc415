# SPDX-License-Identifier: Apache-2.0
"""A look at each source before anything is written: what it holds, and whether it can be taken.

The genes' names are put aside on disk, equal lists once, so that looking at 10,000 sources holds the names of one.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from megacell.core.errors import DataError, MegacellError, UsageError
from megacell.core.files import hash_source, write_whole
from megacell.store.conversion.filters import kept_cells
from megacell.store.conversion.graph_pieces import weights_type
from megacell.store.conversion.options import Sample, State
from megacell.store.format.manifest import Manifest, ObsColumn
from megacell.store.format.obs import OBS_ROWS, Schema, describe, tidy
from megacell.store.sources.choice import Settled
from megacell.store.sources.count_kinds import LENGTH_NORMALISED
from megacell.store.sources.features import FEWEST
from megacell.store.sources.matrix import is_of_machine
from megacell.store.sources.source import CellSource
from megacell.store.sources.species import settle_species, species_of

Texts = np.ndarray[Any, Any]
LEAST_MEDIAN = 200  # counts a cell; droplets without a cell in them have fewer
SKIP_BAD = "--skip-bad leaves them out"
_FEWEST_CELLS = 20  # whose median says something


@dataclass
class Inspection:
    """One source as it was found: either `refused`, or what the conversion needs to know of it.

    `features` names the list of its genes among those put aside, "" where nothing was; `graphs` gives the type of the
    weights of each graph between cells that it has, "" for those not asked for.
    """

    sample: Sample
    refused: MegacellError | None = None
    state: State | None = None
    hash: str = ""
    format: str = ""
    rows: int = 0
    cells: int = 0
    values: int = 0
    kind: str = ""
    matrix: str = ""
    settled: Settled | None = None
    ids: str = ""
    species: str = ""
    genes: int = 0
    features: str = ""
    obs: list[ObsColumn] = field(default_factory=list)
    graphs: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def path(self) -> Path:
        """Where the source lies."""
        return self.sample.path

    @property
    def subset(self) -> bool:
        """True if it measured too few genes for medians."""
        return self.genes < FEWEST

    @property
    def mend_for_none(self) -> str:
        """What would keep some cells of a source of which none is kept."""
        options = self.sample.options
        other = ["ask for others with --where"] if options.where is not None else []
        marked = ["--all-cells keeps those marked as not primary or not passed"] if not options.all_cells else []
        return ", ".join(other + marked)

    def to_json(self) -> dict[str, Any]:
        """Return what `from_json` reads; for a source that was not refused."""
        content = {name: value for name, value in vars(self).items() if name != "refused"}
        state, settled = (asdict(each) if each else None for each in (self.state, self.settled))
        obs = [asdict(column) for column in self.obs]
        return {**content, "sample": self.sample.to_json(), "state": state, "settled": settled, "obs": obs}

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> "Inspection":
        """Read what `to_json` gave."""
        obs = [ObsColumn(**{**c, "categories": c["categories"] and tuple(c["categories"])}) for c in content["obs"]]
        own = {"sample": Sample.from_json(content["sample"]), "obs": obs}
        own |= {"state": State(**content["state"]), "settled": Settled(**content["settled"])}
        return cls(**{**content, **own})


def inspect(sample: Sample, aside: Path | None = None) -> Inspection:
    """Look at one source without reading all of it; what speaks against it is kept, not raised.

    With `aside`, a folder, the genes' names are put there and the file's bytes are hashed.
    """
    found = Inspection(sample)
    try:
        found.state = State.of(sample.path)
        with sample.options.open(sample.path) as source:
            _look(found, source)
            if aside is not None:
                found.features = _put_aside(source, aside)
        if aside is not None:
            found.hash = hash_source(sample.path)
            if block := sample.options.block:  # each block of an archive is a source
                found.hash = xxhash.xxh3_64_hexdigest(f"{found.hash} {block}".encode())
            check_unchanged(found)
    except MegacellError as error:
        found.refused = error
    except OSError as error:
        if is_of_machine(error):  # a full disk under what is put aside, say
            raise
        found.refused = DataError(f"{sample.path}: cannot be read ({error}); check the file and its rights")
    return found


def _look(found: Inspection, source: CellSource) -> None:
    options, path = found.sample.options, found.path
    keep, skipped = kept_cells(source, options)
    found.rows, found.cells, found.format = source.n_cells, int(keep.sum()), source.format
    found.kind, found.matrix, found.ids = source.kind, source.matrix, source.ids
    found.settled, found.genes = source.settled, len(source.gene_ids)
    found.values = source.stored_values
    found.obs, stated = _look_at_obs(found.sample.obs, source)
    wanted = source.graphs(options.neighbours)
    found.graphs = dict.fromkeys(source.graph_names(), "") | {name: weights_type(g) for name, g in wanted.items()}
    missing = [name for name in options.neighbours if name not in wanted]
    found.notes = [*source.notes, *skipped, *(f"has no graph {n}: its cells have no neighbours there" for n in missing)]
    found.species, note = settle_species(source.gene_ids, source.symbols, stated, options.species, str(path))
    found.notes += [note] if note else []
    _refuse_droplets(found, source)
    if found.subset:
        if not options.allow_subset:
            fix = "give all genes, or --allow-subset (medians will leave the source out)"
            raise DataError(f"{path}: {found.matrix} measures only {found.genes:,} genes; {fix}")
        found.notes.append(f"a subset of {found.genes:,} genes: no use for medians")
    if found.kind == LENGTH_NORMALISED:
        found.notes.append("length-normalised: medians of counts do not apply")


def _look_at_obs(given: Mapping[str, str], source: CellSource) -> tuple[list[ObsColumn], set[str]]:
    """Return the schema of the metadata, with what a sheet gives, and what names of species stand there."""
    schema, stated = Schema(), source.stated_species()
    for start in range(0, source.n_cells, OBS_ROWS):
        obs = source.obs(start, start + OBS_ROWS)
        schema.add(column for column in describe(tidy(obs)) if column.name not in given)
        stated |= species_of(obs)
    schema.add(ObsColumn(name, "category", (text,)) for name, text in given.items())
    return schema.columns(), stated


def _refuse_droplets(found: Inspection, source: CellSource) -> None:
    """Refuse what looks like all droplets of a run, most of them without a cell."""
    if found.kind == LENGTH_NORMALISED or source.settled.precision is not None:
        return  # a sample of these is no sample of counts
    totals = source.sampled_totals()
    median = float(np.median(totals)) if len(totals) else 0.0
    if found.rows < _FEWEST_CELLS or median >= LEAST_MEDIAN:
        return
    what = f"a median of {median:,.0f} counts a cell (of {len(totals):,} looked at)"
    if not found.sample.options.allow_low_counts:
        fix = "give the filtered cells, or --allow-low-counts"
        raise DataError(f"{found.path}: {what}: raw droplets, it seems; {fix}")
    found.notes.append(what)


def _put_aside(source: CellSource, aside: Path) -> str:
    """Write the list of genes to a file that its content names, unless it is there; return the name."""
    columns = {"gene_id": source.gene_ids, "symbol": source.symbols, "biotype": source.biotypes}
    digest = xxhash.xxh3_128(source.ids.encode())
    for texts in columns.values():
        digest.update("\0".join(texts).encode())
    name = digest.hexdigest()
    if not (aside / f"{name}.parquet").exists():
        table = pa.table({key: pa.array(texts, pa.string()) for key, texts in columns.items()})
        sink = pa.BufferOutputStream()
        pq.write_table(table, sink, compression="zstd")
        write_whole(aside / f"{name}.parquet", sink.getvalue().to_pybytes())
    return name


def read_features(aside: Path, name: str) -> tuple[Texts, Texts, Texts]:
    """Return gene ids, symbols and biotypes that `inspect` put aside."""
    table = pq.read_table(aside / f"{name}.parquet")
    ids, symbols, biotypes = (table[key].to_numpy() for key in ("gene_id", "symbol", "biotype"))
    return ids, symbols, biotypes


def refuse(inspections: Sequence[Inspection]) -> None:
    """Raise for sources that were refused: the error itself if it is one, else all of them in a line."""
    errors = [i.refused for i in inspections if i.refused is not None]
    if len(errors) == 1:
        raise errors[0]
    if errors:
        kind = UsageError if all(isinstance(e, UsageError) for e in errors) else DataError
        raise kind(f"{len(errors)} of {len(inspections)} files refused ({SKIP_BAD}): {' | '.join(map(str, errors))}")


def hashes_of(store: Manifest | None) -> dict[str, str]:
    """Return what each source of a store is called in messages, by its hash; for `refuse_repeated`."""
    return {source.hash: f"source {source.name!r} of the store" for source in (store.sources if store else ())}


def refuse_repeated(found: Inspection, known: dict[str, str]) -> None:
    """Mark as refused a source whose very bytes are in the store, or in the conversion, already."""
    if found.refused is None:
        if found.hash in known:
            found.refused = DataError(f"{found.path}: the same bytes as {known[found.hash]}; leave it out")
        known.setdefault(found.hash, str(found.path))


def refuse_absent_graphs(good: Sequence[Inspection]) -> None:
    """Raise for a graph that is asked for and that no source has."""
    there = sorted({name for found in good for name in found.graphs})
    for name in good[0].sample.options.neighbours if good else ():
        if not any(found.graphs.get(name) for found in good):
            listed = f"there are {', '.join(there)}" if there else "there are none"
            raise UsageError(f"--neighbours {name}: no file has that graph in obsp; {listed}")


def check_unchanged(found: Inspection) -> None:
    """Raise if a source is no longer the one that was looked at."""
    try:
        same = State.of(found.path) == found.state
    except OSError:
        same = False
    if not same:
        raise DataError(f"{found.path}: changed while it was read; convert again when nothing writes to it")
