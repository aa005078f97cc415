# SPDX-License-Identifier: Apache-2.0
"""The manifest: the only truth about what a store holds, replaced last and atomically.

``manifest.json`` names every file of a generation with its size and XXH3, so whatever it does not name does not
exist for a reader. ``manifest-<generation>.json`` keeps the same bytes, by which a reader finds the generation
that it opened after others were appended. docs/format.md describes each field.
"""

import json
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields, replace
from itertools import count
from pathlib import Path, PurePosixPath
from typing import Any, Self

import xxhash

from megacell.core.errors import DataError
from megacell.core.files import hash_file, write_whole
from megacell.store.format.links import plain_size

FORMAT = "megacell-store"
VERSION = 1
NAME = "manifest.json"
LARGEST = 512 << 20  # bytes; that of ten thousand files with as many columns has a tenth
KINDS = ("category", "string", "integer", "number", "boolean")  # of a column
_UNSIGNED = "0" * 16
_TOO_LARGE = 1 << 53  # of cells, bytes, …
_GENERATION = re.compile(r"-\d+$")


@dataclass(frozen=True)
class FileRecord:
    """One file: size in bytes, XXH3-64 in hexadecimal, and for an array its NumPy dtype and shape."""

    bytes: int
    xxh3: str
    dtype: str | None = None
    shape: tuple[int, ...] | None = None

    @classmethod
    def of(cls, path: Path, dtype: str | None = None, shape: tuple[int, ...] | None = None) -> Self:
        """Measure a file that lies on disk."""
        return cls(path.stat().st_size, hash_file(path), dtype, shape)


@dataclass(frozen=True)
class ShardRecord:
    """One shard: the folder ``shards/<name>``, its cells, its stored values and its files by name."""

    name: str
    cells: int
    values: int
    files: dict[str, FileRecord]

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> Self:
        """Read a shard's member of a manifest; KeyError, TypeError or ValueError for what is none."""
        name, files = _safe(_text(content, "name")), files_from_json(content["files"])
        return cls(name, _count(content, "cells"), _count(content, "values"), files)


@dataclass(frozen=True)
class Source:
    """One input file as it was read.

    Attributes
    ----------
    name : str
        Unique in the store; made from the file's name.
    file, format, size, hash
        File name, "h5ad", bytes and XXH3-64 of the input.
    rows, cells : int
        Cells in the file, and those of them kept in the store.
    kind : str
        "umi", "fractional" or "length-normalised".
    matrix : str
        "X", "raw", "layer:NAME", or "recover:" and one of these.
    ids : str
        "ensembl" or "symbol": what the file names its genes by.
    genes : int
        Genes that it measured (`panel` is the number of their list in the panels file).
    subset : bool
        True if it measured too few genes for medians.
    species : str
        "human", "mouse", …
    notes : tuple of str
        What was dropped, summed, assumed.
    """

    name: str
    file: str
    format: str
    size: int
    hash: str
    rows: int
    cells: int
    kind: str
    matrix: str
    ids: str
    genes: int
    panel: int
    subset: bool
    species: str
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class ObsColumn:
    """One column of the cells' metadata as readers see it, whatever each shard holds.

    `kind` is "category" (with `categories`, `ordered`), "string", "integer", "number" or "boolean".
    """

    name: str
    kind: str
    categories: tuple[str, ...] | None = None
    ordered: bool = False


@dataclass(frozen=True)
class GraphRecord:
    """One graph between cells: the folder ``neighbours/<name>``, over cells 0 … `cells` - 1."""

    cells: int
    files: dict[str, FileRecord]

    @property
    def edges(self) -> int:
        """How many edges there are; one from a to b and one from b to a are two."""
        record = self.files.get("indices.npy")
        return record.shape[0] if record is not None and record.shape else 0


@dataclass(frozen=True)
class Manifest:
    """All of one generation of a store."""

    generation: int
    species: str
    cells: int
    genes: int
    values: int
    files: dict[str, FileRecord]  # genes-<generation>.parquet, panels-<generation>.parquet, earlier manifests
    genes_file: str
    panels_file: str
    shards: tuple[ShardRecord, ...]
    sources: tuple[Source, ...]
    obs: tuple[ObsColumn, ...]
    earlier: tuple[str, ...] = ()  # manifests of the generations that can still be opened, oldest first
    neighbours: dict[str, GraphRecord] = field(default_factory=dict)
    digest: str = ""  # XXH3-64 of the file's bytes; not in the file

    @property
    def graphs(self) -> dict[str, str]:
        """Name in ``neighbours`` by the graph's own name, which lacks the hyphen and generation of who wrote it."""
        return {_GENERATION.sub("", name): name for name in self.neighbours}

    def new_shards(self) -> Iterator[str]:
        """Yield names for shards to come, none of which any generation had: they ascend with the generations."""
        numbers = [int(shard.name) for shard in self.shards if shard.name.isdecimal()]
        return new_shards(max(numbers, default=-1) + 1)

    @property
    def folders(self) -> set[str]:
        """The folders of its shards and graphs."""
        return {f"shards/{shard.name}" for shard in self.shards} | {f"neighbours/{name}" for name in self.neighbours}

    def all_files(self) -> Iterator[tuple[str, FileRecord]]:
        """Yield every file that the manifest names: its path in the store and its record."""
        yield from self.files.items()
        yield from self.own_files()

    def own_files(self) -> Iterator[tuple[str, FileRecord]]:
        """Yield the files by which this generation is read; `files` names those of earlier generations beside."""
        yield from ((name, self.files[name]) for name in (self.genes_file, self.panels_file))
        for shard in self.shards:
            yield from ((f"shards/{shard.name}/{name}", record) for name, record in shard.files.items())
        for name, graph in self.neighbours.items():
            yield from ((f"neighbours/{name}/{file}", record) for file, record in graph.files.items())

    def dumps(self) -> bytes:
        """Return the bytes of the manifest file, checksum included."""
        body = asdict(self)
        del body["digest"]
        content = {"format": FORMAT, "version": VERSION, **body, "checksum": _UNSIGNED}
        text = json.dumps(content, indent=1, ensure_ascii=True, allow_nan=False).encode() + b"\n"
        return _sign(text, _UNSIGNED, xxhash.xxh3_64_hexdigest(text))

    @classmethod
    def loads(cls, text: bytes, where: Path) -> "Manifest":
        """Read the bytes of a manifest file.

        Raises
        ------
        DataError
            Not JSON, another format, a newer version, a wrong checksum or fields that are not as the format says.
        """
        try:
            content = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{where}: not readable as JSON ({error}); restore it from a copy") from None
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            raise DataError(f"{where}: not the manifest of a cell store; give the folder that `megacell convert` made")
        version = content.get("version")
        if isinstance(version, int) and version > VERSION:
            fix = "install a newer megacell to read it"
            raise DataError(f"{where}: format version {version}, this megacell reads up to {VERSION}; {fix}")
        checksum = content.get("checksum")
        if not isinstance(checksum, str) or _unsigned_hash(text, checksum) != checksum:
            raise DataError(f"{where}: the manifest is damaged (wrong checksum); restore it from a copy")
        try:
            return replace(_parse(content), digest=xxhash.xxh3_64_hexdigest(text))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise DataError(f"{where}: the manifest is malformed ({error!r:.200}); restore it from a copy") from None

    @classmethod
    def open(cls, store: Path, generation: int | None = None) -> "Manifest":
        """Read a store's manifest: the current one, or that of an earlier generation.

        Raises
        ------
        DataError
            No store there, no such generation, or a manifest that cannot be read.
        """
        manifest = cls.read(store, NAME)
        if generation is None or generation == manifest.generation:
            return manifest
        name = generation_name(generation)
        if name not in manifest.earlier:
            raise DataError(f"{store}: holds no generation {generation}; its newest is {manifest.generation}")
        return cls.read(store, name)

    @classmethod
    def read(cls, store: Path, name: str) -> "Manifest":
        """Read one of a store's manifests by its file's name; errors as `open`'s."""
        where = store / name
        try:
            if (size := plain_size(where)) > LARGEST:
                raise DataError(f"{where}: {size:,} bytes, and {LARGEST:,} at most are read; it is no manifest of ours")
            text = where.read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            raise DataError(f"{store}: not a cell store (no {name}); make one with `megacell convert`") from None
        except OSError as error:
            raise DataError(f"{where}: cannot be read ({error.strerror}); check the path and its rights") from None
        return cls.loads(text, where)

    def commit(self, store: Path) -> None:
        """Make this generation the store's: from the last rename on readers see it, until then the one before."""
        text = self.dumps()
        write_whole(store / generation_name(self.generation), text)
        write_whole(store / NAME, text)


def new_shards(first: int = 0) -> Iterator[str]:
    """Yield shards' names by number."""
    return (f"{number:05d}" for number in count(first))


def generation_name(generation: int) -> str:
    """Return the name under which a generation's manifest is kept."""
    return f"manifest-{generation}.json"


def _sign(text: bytes, old: str, new: str) -> bytes:
    """Put another checksum into a manifest's last line but one."""
    head, found, tail = text.rpartition(f'"checksum": "{old}"'.encode())
    return head + f'"checksum": "{new}"'.encode() + tail if found else b""


def _unsigned_hash(text: bytes, checksum: str) -> str:
    return xxhash.xxh3_64_hexdigest(_sign(text, checksum, _UNSIGNED))


def _parse(content: dict[str, Any]) -> Manifest:
    """Build a manifest from JSON, with every type checked; members that version 1 does not know are left alone."""
    made = Manifest(
        generation=_count(content, "generation", least=1),
        species=_text(content, "species"),
        cells=_count(content, "cells"),
        genes=_count(content, "genes"),
        values=_count(content, "values"),
        files=files_from_json(content["files"]),
        genes_file=_safe(_text(content, "genes_file")),
        panels_file=_safe(_text(content, "panels_file")),
        shards=tuple(ShardRecord.from_json(shard) for shard in content["shards"]),
        sources=tuple(_source(s) for s in content["sources"]),
        obs=tuple(_obs_column(c) for c in content["obs"]),
        earlier=tuple(_safe(str(name)) for name in content["earlier"]),
        neighbours={
            _safe(name): GraphRecord(_count(graph, "cells"), files_from_json(graph["files"]))
            for name, graph in content["neighbours"].items()
        },
    )
    if made.cells != sum(shard.cells for shard in made.shards):
        raise ValueError("its cells are not those of its shards")
    if len({shard.name for shard in made.shards}) < len(made.shards):
        raise ValueError("a shard stands twice")
    return made


_TEXTS, _COUNTS = ([each.name for each in fields(Source) if each.type is kind] for kind in (str, int))


def _source(content: dict[str, Any]) -> Source:
    known: dict[str, Any] = {name: _text(content, name) for name in _TEXTS}
    known |= {name: _count(content, name) for name in _COUNTS}
    return Source(**known, subset=content["subset"] is True, notes=tuple(map(str, content["notes"])))


def _obs_column(content: dict[str, Any]) -> ObsColumn:
    categories, kind = content["categories"], _text(content, "kind")
    if kind not in KINDS:
        raise ValueError(f"no kind of columns: {kind[:40]!r}")
    if categories is not None and len(set(map(str, categories))) < len(categories):
        raise ValueError(f"a category of {content['name']!r:.80} stands twice")
    return ObsColumn(
        _text(content, "name"),
        kind,
        None if categories is None else tuple(map(str, categories)),
        content["ordered"] is True,
    )


def files_from_json(content: dict[str, Any]) -> dict[str, FileRecord]:
    """Read a member of file records."""
    return {_safe(name): _file(record) for name, record in content.items()}


def _file(content: dict[str, Any]) -> FileRecord:
    dtype, shape = content["dtype"], content["shape"]
    return FileRecord(
        _count(content, "bytes"),
        _text(content, "xxh3"),
        None if dtype is None else str(dtype),
        None if shape is None else tuple(map(int, shape)),
    )


def _text(content: dict[str, Any], key: str) -> str:
    if not isinstance(content[key], str):
        raise TypeError(f"{key} is not text")
    return str(content[key])


def _count(content: dict[str, Any], key: str, least: int = 0) -> int:
    value = content[key]
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value < _TOO_LARGE:
        raise TypeError(f"{key} is not a whole number from {least}")
    return value


def _safe(name: str) -> str:
    """Refuse a name that leads out of its folder."""
    if not name or PurePosixPath(name).name != name or name in (".", ".."):
        raise ValueError(f"{name!r} is not a plain file name")
    return name
