# SPDX-License-Identifier: Apache-2.0
"""What a conversion will do, written down in a folder of the store so that any process on any machine can do its part.

The folder ``plan.tmp`` is no part of the format: readers do not see it, and a commit takes it away. It holds
``plan.json``, the tables of the generation to come, gene numbers by list of genes, and for each shard that is
finished or failed a file that says so. A conversion that was killed finds it and goes on.
"""

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import lru_cache
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from megacell.core.errors import DataError
from megacell.core.files import TEMPORARY, list_folder, remove_tree, write_whole
from megacell.store.conversion.inspection import Inspection, read_features
from megacell.store.format.gene_table import GeneTable
from megacell.store.format.graph import widest_weights
from megacell.store.format.links import plain_size
from megacell.store.format.manifest import Manifest, ObsColumn, Source, new_shards
from megacell.store.format.panels import PanelWriter
from megacell.store.format.shard import FOLDER
from megacell.store.sources.count_kinds import FRACTIONAL, UMI
from megacell.store.sources.features import symbol_map

Array = np.ndarray[Any, Any]
PLAN = f"plan{TEMPORARY}"
GENES, PANELS, HASHES = "genes.parquet", "panels.parquet", "gene_hashes.npy"
_BYTES_OF = {UMI: 3, FRACTIONAL: 6}  # of one stored value, with a byte's or float32's count and a uint16 gene
_SHARES, _LEAST = 8, 256 << 20  # little data are cut into so many shards, unless smaller than so many bytes


@dataclass(frozen=True)
class Part:
    """Rows `start` up to `stop` of one source, by its number in the store."""

    source: int
    start: int
    stop: int


@dataclass(frozen=True)
class Plan:
    """A whole generation, ready to be made.

    Attributes
    ----------
    store : Path
    request : str
        What was asked for, as a hash: a plan for the same request can be gone on with.
    first : int
        Number of the first source of this conversion.
    genes : int
        Of the whole store.
    inspections, sources
        By source of this conversion; cells are as far as known without the counts.
    left_out : list of str
        Why each file that was refused at the first look was.
    obs : list of ObsColumn
        Of the whole store.
    graphs : dict
        Type of the weights by name of each graph that is asked for.
    names, shards
        By shard of this conversion.
    """

    store: Path
    request: str
    species: str
    first: int
    genes: int
    inspections: list[Inspection]
    left_out: list[str]
    sources: list[Source]
    obs: list[ObsColumn]
    graphs: dict[str, str]
    names: list[str]
    shards: list[list[Part]]

    @property
    def folder(self) -> Path:
        """Where the plan lies."""
        return self.store / PLAN

    def numbers(self, source: int) -> Array:
        """Return the store's number of each gene of a source of this conversion: int32."""
        numbers: Array = np.load(self.folder / f"{self.inspections[source].features}.npy")
        return numbers

    def save(self) -> None:
        """Write plan.json; from then on the conversion can be gone on with."""
        content = {
            **{name: value for name, value in vars(self).items() if name != "store"},
            "inspections": [found.to_json() for found in self.inspections],
            "sources": [asdict(source) for source in self.sources],
            "obs": [asdict(column) for column in self.obs],
            "shards": [[[p.source, p.start, p.stop] for p in parts] for parts in self.shards],
        }
        write_whole(self.folder / "plan.json", json.dumps(content).encode())


def load_plan(store: Path) -> Plan | None:
    """Read the plan that an unfinished conversion left, None if there is none."""
    path = store / PLAN / "plan.json"
    try:
        plain_size(path, 1)
        return _load(store.absolute(), path.stat().st_mtime_ns)
    except (OSError, DataError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None


@lru_cache(maxsize=2)
def _load(store: Path, _modified: int) -> Plan:
    content = json.loads((store / PLAN / "plan.json").read_bytes())
    if not all(name.isdecimal() for name in content["names"]):  # they become folders' names
        raise ValueError("no names of shards")
    own = {
        "store": store,
        "inspections": [Inspection.from_json(each) for each in content["inspections"]],
        "sources": [Source(**{**each, "notes": tuple(each["notes"])}) for each in content["sources"]],
        "obs": [ObsColumn(**{**c, "categories": c["categories"] and tuple(c["categories"])}) for c in content["obs"]],
        "shards": [[Part(*part) for part in parts] for parts in content["shards"]],
    }
    return Plan(**{**content, **own})


def make_plan(
    store: Path,
    request: str,
    before: Manifest | None,
    good: list[Inspection],
    left_out: list[str],
    obs: Sequence[ObsColumn],
    shard_bytes: int,
) -> Plan:
    """Unite what the sources hold with what the store holds, cut the work into shards and write it all down."""
    folder = store / PLAN
    genes = GeneTable.read(store / before.genes_file, before.genes) if before else GeneTable()
    first = len(before.sources) if before else 0
    names = name_sources([found.path for found in good], [s.name for s in before.sources] if before else [])
    shard_bytes = min(shard_bytes, max(_LEAST, sum(map(_bytes_of, good)) // _SHARES))
    with PanelWriter(folder / PANELS, store / before.panels_file if before else None) as panels:
        sources = _number_genes(folder, good, names, genes, panels)
    genes.write(folder / GENES)
    np.save(folder / HASHES, genes.hashes())
    shards = _pack([_parts(first + i, found, shard_bytes) for i, found in enumerate(good)], good, first, shard_bytes)
    options = good[0].sample.options
    plan = Plan(
        store=store.absolute(),
        request=request,
        species=good[0].species,
        first=first,
        genes=len(genes),
        inspections=good,
        left_out=left_out,
        sources=sources,
        obs=list(obs),
        graphs={name: widest_weights(found.graphs.get(name, "") for found in good) for name in options.neighbours},
        names=list(islice(before.new_shards() if before else new_shards(), len(shards))),
        shards=shards,
    )
    plan.save()
    return plan


def _number_genes(
    folder: Path, good: Sequence[Inspection], names: Sequence[str], genes: GeneTable, panels: PanelWriter
) -> list[Source]:
    """Add the sources' genes to the table, each distinct list once; write their numbers; return the records."""
    known = None
    if any(found.ids == "symbol" for found in good):
        known = _known_symbols(folder, good, genes)
    of_list: dict[str, tuple[int, int, tuple[str, ...]]] = {}
    sources = []
    for name, found in zip(names, good, strict=True):
        if found.features not in of_list:
            ids, symbols, biotypes = read_features(folder, found.features)
            notes: tuple[str, ...] = ()
            if found.ids == "symbol" and known is not None:
                mapped = known.reindex(ids)
                n = int(mapped.notna().sum())
                ids = np.where(mapped.notna(), mapped.to_numpy(object), ids)
                rest = f"{len(ids) - n:,} keep their symbol"
                notes = (f"symbols only: {n:,} have an id by the other sources, {rest}",)
            numbers = genes.add(ids, symbols, biotypes)
            np.save(folder / f"{found.features}.npy", numbers)
            measured = np.unique(numbers).astype(np.uint32)
            of_list[found.features] = len(measured), panels.add(measured), notes
        measured_genes, panel, notes = of_list[found.features]
        sources.append(_record(name, found, measured_genes, panel, notes))
    return sources


def _known_symbols(folder: Path, good: Sequence[Inspection], genes: GeneTable) -> Any:
    """Return id by symbol over the store's table and all sources that name ids, list by list."""
    pairs = pd.DataFrame({"id": genes.gene_ids, "symbol": genes.symbols}, dtype=object)
    for features in dict.fromkeys(found.features for found in good if found.ids == "ensembl"):
        ids, symbols, _ = read_features(folder, features)
        own = pd.DataFrame({"id": ids, "symbol": symbols}, dtype=object)
        pairs = pd.concat([pairs, own], ignore_index=True).drop_duplicates()
    return symbol_map([(pairs["id"].to_numpy(object), pairs["symbol"].to_numpy(object))])


def _record(name: str, found: Inspection, genes: int, panel: int, notes: tuple[str, ...]) -> Source:
    assert found.state is not None
    return Source(
        name=name,
        file=found.path.name,
        format=found.format,
        size=found.state.size,
        hash=found.hash,
        rows=found.rows,
        cells=found.cells,
        kind=found.kind,
        matrix=found.matrix,
        ids=found.ids,
        genes=genes,
        panel=panel,
        subset=found.subset,
        species=found.species,
        notes=(*found.notes, *notes),
    )


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


def _bytes_of(found: Inspection) -> int:
    """Return how many bytes a source's values will take."""
    return found.values * _BYTES_OF.get(found.kind, 6)


def _parts(source: int, found: Inspection, shard_bytes: int) -> list[Part]:
    """Cut a file by rows so that no part fills more than a shard."""
    size = _bytes_of(found)
    cuts = np.linspace(0, found.rows, max(1, -(-size // shard_bytes)) + 1).astype(np.int64)
    return [Part(source, int(a), int(b)) for a, b in pairwise(cuts) if b > a]


def _pack(parts: list[list[Part]], inspections: list[Inspection], first: int, shard_bytes: int) -> list[list[Part]]:
    """Let small sources that follow each other, and store counts alike, share a shard."""
    shards: list[list[Part]] = []
    filled, whole = 0.0, None
    for own in parts:
        for part in own:
            found = inspections[part.source - first]
            size = _bytes_of(found) * (part.stop - part.start) / max(1, found.rows)
            if not shards or filled + size > shard_bytes or whole != (found.kind == UMI):
                shards.append([])
                filled, whole = 0.0, found.kind == UMI
            shards[-1].append(part)
            filled += size
    return shards


def shard_folder(store: Path, name: str) -> Path:
    """Return where a shard is, or will be."""
    return store / FOLDER / name


def remove_unfinished(store: Path, name: str) -> None:
    """Remove what processes that were killed left of a shard, and one of the name that no manifest names."""
    for left in list_folder(store, FOLDER):
        if left == name or (left.startswith(f"{name}-") and left.endswith(TEMPORARY)):
            with suppress(OSError):
                remove_tree(store, f"{FOLDER}/{left}")
