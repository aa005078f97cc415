# SPDX-License-Identifier: Apache-2.0
"""What a conversion will do: each file looked at and judged, genes and metadata united, the work cut into shards."""

import os
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from megacell.store.counts import FRACTIONAL, LENGTH_NORMALISED, UMI
from megacell.store.durable import hash_file
from megacell.store.errors import DataError, MegacellError, UsageError
from megacell.store.genes import FEWEST, GeneTable, symbol_map
from megacell.store.manifest import Manifest, ObsColumn, Source
from megacell.store.obs import describe, tidy, unite
from megacell.store.panels import Panels
from megacell.store.sources.h5ad import H5adSource, open_h5ad
from megacell.store.sources.h5ad_counts import Settled
from megacell.store.species import settle_species

SUFFIX = ".h5ad"
_BYTES_OF = {UMI: 3, FRACTIONAL: 6}  # of one stored value, with a byte's or float32's count and a uint16 gene


@dataclass(frozen=True)
class Options:
    """How sources are read; the same for all files of a conversion. `convert` documents the fields."""

    counts: str = "auto"
    gene_ids: str = "auto"
    species: str | None = None
    allow_subset: bool = False
    allow_length_normalised: bool = False
    all_cells: bool = False

    def open(self, path: Path, settled: Settled | None = None, scratch: Path | None = None) -> H5adSource:
        """Open one file; `settled` and `scratch` as for `open_h5ad`."""
        return open_h5ad(
            path,
            self.counts,
            self.gene_ids,
            allow_length_normalised=self.allow_length_normalised,
            scratch=scratch,
            settled=settled,
        )


@dataclass(frozen=True)
class State:
    """What says that a file is still the one that was looked at."""

    size: int
    modified: int
    inode: int

    @classmethod
    def of(cls, path: Path) -> "State":
        """Look at a file."""
        stat = os.stat(path)
        return cls(stat.st_size, stat.st_mtime_ns, stat.st_ino)


@dataclass
class Inspection:
    """One file as it was found: either `refused`, or what the conversion needs to know of it."""

    path: Path
    refused: MegacellError | None = None
    state: State | None = None
    hash: str = ""
    rows: int = 0
    cells: int = 0
    values: int = 0
    kind: str = ""
    matrix: str = ""
    settled: Settled | None = None
    ids: str = ""
    species: str = ""
    gene_ids: np.ndarray[Any, Any] = field(default_factory=lambda: np.zeros(0, object))
    symbols: np.ndarray[Any, Any] = field(default_factory=lambda: np.zeros(0, object))
    biotypes: np.ndarray[Any, Any] = field(default_factory=lambda: np.zeros(0, object))
    obs: list[ObsColumn] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def subset(self) -> bool:
        """True if it measured too few genes for medians."""
        return len(self.gene_ids) < FEWEST


@dataclass(frozen=True)
class Part:
    """Rows `start` up to `stop` of one source, by its number in the store."""

    source: int
    start: int
    stop: int


@dataclass(frozen=True)
class Plan:
    """A whole generation, ready to be made."""

    before: Manifest | None
    species: str
    inspections: list[Inspection]
    sources: list[Source]  # of this conversion; number of the first = len(before.sources)
    numbers: list[np.ndarray[Any, Any]]  # gene numbers, int32, by source of this conversion
    genes: GeneTable
    panels: Panels
    obs: list[ObsColumn]
    shards: list[list[Part]]


def find_files(sources: str | os.PathLike[str] | Iterable[str | os.PathLike[str]]) -> list[Path]:
    """Return the .h5ad files that paths and folders name, each once, folders' files by name.

    Raises
    ------
    UsageError
        A path that is not there, or nothing found.
    """
    given = [sources] if isinstance(sources, str | os.PathLike) else list(sources)
    found: dict[Path, Path] = {}
    for path in map(Path, given):
        if path.is_dir():
            files = sorted(p for p in path.rglob(f"*{SUFFIX}") if p.is_file() and not p.name.startswith("."))
            if not files:
                raise UsageError(f"{path}: no {SUFFIX} file in this folder")
        elif path.exists():
            files = [path]
        else:
            raise UsageError(f"{path}: no such file or folder")
        for file in files:
            found.setdefault(file.resolve(), file)
    if not found:
        raise UsageError(f"no sources given; name {SUFFIX} files or folders that hold some")
    return list(found.values())


def name_sources(paths: Sequence[Path], taken: Iterable[str] = ()) -> list[str]:
    """Name sources by their files; by as many folders above as make equal names differ."""
    parts = [path.resolve().with_suffix("").parts for path in paths]
    deepest = max(map(len, parts))
    times = [Counter(own[-depth:] for own in parts) for depth in range(deepest + 1)]
    names: list[str] = []
    used = set(taken)
    for own in parts:
        depth = 1
        while depth < len(own) - 1 and (times[depth][own[-depth:]] > 1 or "/".join(own[-depth:]) in used):
            depth += 1
        base = name = "/".join(own[-depth:])
        number = 2
        while name in used:
            name, number = f"{base}-{number}", number + 1
        used.add(name)
        names.append(name)
    return names


def inspect(path: Path, options: Options) -> Inspection:
    """Look at one file without reading all of it; what speaks against it is kept, not raised."""
    found = Inspection(path)
    try:
        found.state = State.of(path)
        with options.open(path) as source:
            _look(found, source, options)
    except MegacellError as error:
        found.refused = error
    except OSError as error:
        found.refused = DataError(f"{path}: cannot be read ({error}); check the file and its rights")
    return found


def _look(found: Inspection, source: H5adSource, options: Options) -> None:
    obs = source.obs()
    keep = kept_cells(obs, options)
    found.rows, found.cells = len(obs), int(keep.sum())
    found.kind, found.matrix, found.ids = source.kind, source.matrix, source.ids
    found.settled = source.settled
    found.gene_ids, found.symbols, found.biotypes = source.gene_ids, source.symbols, source.biotypes
    found.values = source.stored_values
    found.obs = describe(tidy(obs))
    found.notes = list(source.notes)
    if skipped := found.rows - found.cells:
        found.notes.append(f"{skipped:,} cells with is_primary_data == False skipped")
    found.species, note = settle_species(
        source.gene_ids, source.symbols, source.stated_species, options.species, str(found.path)
    )
    found.notes += [note] if note else []
    if found.subset:
        if not options.allow_subset:
            mend = "give all genes, or --allow-subset (medians will leave the source out)"
            raise DataError(f"{found.path}: {found.matrix} measures only {len(source.gene_ids):,} genes; {mend}")
        found.notes.append(f"a subset of {len(source.gene_ids):,} genes: no use for medians")
    if found.kind == LENGTH_NORMALISED:
        found.notes.append("length-normalised: medians of counts do not apply")


def kept_cells(obs: pd.DataFrame, options: Options) -> np.ndarray[Any, Any]:
    """Return bool [rows]: all but those that the file says are copies of another data set's cells."""
    if options.all_cells or "is_primary_data" not in obs:
        return np.ones(len(obs), bool)
    primary = obs["is_primary_data"].astype(object).astype(str).str.strip().str.lower()
    return np.asarray(~primary.isin(["false", "0", "0.0"]))


def refuse(inspections: Sequence[Inspection]) -> None:
    """Raise for files that were refused: the error itself if it is one, else all of them in a line."""
    errors = [i.refused for i in inspections if i.refused is not None]
    if len(errors) == 1:
        raise errors[0]
    if errors:
        kind = UsageError if all(isinstance(e, UsageError) for e in errors) else DataError
        raise kind(f"{len(errors)} of {len(inspections)} files refused: " + " | ".join(map(str, errors)))


def hash_files(inspections: Sequence[Inspection], before: Manifest | None, advance: Callable[[str], None]) -> None:
    """Fill in the files' hashes and refuse one whose very bytes are in the store, or in the conversion, already."""
    known = {source.hash: f"source {source.name!r} of the store" for source in (before.sources if before else ())}
    for found in inspections:
        advance(f"hashing {found.path.name}")
        found.hash = hash_file(found.path)
        if found.hash in known:
            raise DataError(f"{found.path}: the same bytes as {known[found.hash]}; leave it out")
        known[found.hash] = str(found.path)
        check_unchanged(found)


def check_unchanged(found: Inspection) -> None:
    """Raise if a file is no longer the one that was looked at."""
    if State.of(found.path) != found.state:
        raise DataError(f"{found.path}: changed while it was read; convert again when nothing writes to it")


def make_plan(
    inspections: list[Inspection], before: Manifest | None, genes: GeneTable, panels: Panels, shard_bytes: int
) -> Plan:
    """Unite what the files hold with what the store holds, and cut the work into shards."""
    known = symbol_map(
        [(genes.gene_ids, genes.symbols)] + [(i.gene_ids, i.symbols) for i in inspections if i.ids == "ensembl"]
    )
    names = name_sources([i.path for i in inspections], [s.name for s in before.sources] if before else [])
    numbers, sources = [], []
    for name, found in zip(names, inspections, strict=True):
        ids, notes = found.gene_ids, list(found.notes)
        if found.ids == "symbol":
            mapped = known.reindex(ids)
            n = int(mapped.notna().sum())
            ids = np.where(mapped.notna(), mapped.to_numpy(object), ids)
            rest = f"{len(ids) - n:,} keep their symbol"
            notes.append(f"symbols only: {n:,} have an id by the other sources, {rest}")
        own = genes.add(ids, found.symbols, found.biotypes)
        numbers.append(own)
        sources.append(_record(name, found, own, notes, panels))
    first = len(before.sources) if before else 0
    parts = [_parts(first + i, found, shard_bytes) for i, found in enumerate(inspections)]
    schemas = [list(before.obs)] if before else []
    return Plan(
        before=before,
        species=inspections[0].species,
        inspections=inspections,
        sources=sources,
        numbers=numbers,
        genes=genes,
        panels=panels,
        obs=unite(schemas + [found.obs for found in inspections]),
        shards=_pack(parts, inspections, first, shard_bytes),
    )


def _record(name: str, found: Inspection, numbers: np.ndarray[Any, Any], notes: list[str], panels: Panels) -> Source:
    measured = np.unique(numbers).astype(np.uint32)
    assert found.state is not None
    return Source(
        name=name,
        file=found.path.name,
        format="h5ad",
        size=found.state.size,
        hash=found.hash,
        rows=found.rows,
        cells=found.cells,
        kind=found.kind,
        matrix=found.matrix,
        ids=found.ids,
        genes=len(measured),
        panel=panels.add(measured),
        subset=found.subset,
        species=found.species,
        notes=tuple(notes),
    )


def _parts(source: int, found: Inspection, shard_bytes: int) -> list[Part]:
    """Cut a file by rows so that no part fills more than a shard."""
    size = found.values * _BYTES_OF.get(found.kind, 6)
    cuts = np.linspace(0, found.rows, max(1, -(-size // shard_bytes)) + 1).astype(np.int64)
    return [Part(source, int(a), int(b)) for a, b in pairwise(cuts) if b > a]


def _pack(parts: list[list[Part]], inspections: list[Inspection], first: int, shard_bytes: int) -> list[list[Part]]:
    """Let small sources that follow each other, and store counts alike, share a shard."""
    shards: list[list[Part]] = []
    filled, whole = 0.0, None
    for own in parts:
        for part in own:
            found = inspections[part.source - first]
            size = found.values * _BYTES_OF.get(found.kind, 6) * (part.stop - part.start) / max(1, found.rows)
            if not shards or filled + size > shard_bytes or whole != (found.kind == UMI):
                shards.append([])
                filled, whole = 0.0, found.kind == "umi"
            shards[-1].append(part)
            filled += size
    return shards


def as_fractional(found: Inspection) -> Inspection:
    """Return a source that turned out to hold fractions further on than it was judged by."""
    assert found.settled is not None
    settled = replace(found.settled, kind=FRACTIONAL)
    return replace(found, kind=FRACTIONAL, settled=settled, notes=[*found.notes, "fractions among whole counts"])
