# SPDX-License-Identifier: Apache-2.0
"""How sources are read, file by file: the options of a conversion, and the sheet that gives a file its own."""

import csv
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from megacell.core.errors import DataError, UsageError
from megacell.store.sources.choice import Settled
from megacell.store.sources.source import CellSource, open_source

_OWN = ("path", "counts", "gene_ids")  # columns of a sheet that are no metadata of cells


@dataclass(frozen=True)
class Options:
    """How a source is read; `convert` documents the fields."""

    counts: str = "auto"
    gene_ids: str = "auto"
    species: str | None = None
    allow_subset: bool = False
    allow_length_normalised: bool = False
    allow_low_counts: bool = False
    all_cells: bool = False
    id_map: str | None = None
    where: str | None = None
    min_counts: float = 0
    min_genes: int = 0
    neighbours: tuple[str, ...] = ()
    block: int = 0  # of an archive of bionemo-scdl; set by `convert`

    def open(self, path: Path, settled: Settled | None = None, scratch: Path | None = None) -> CellSource:
        """Open one source; `settled` and `scratch` as for `open_source`."""
        return open_source(
            path,
            self.counts,
            self.gene_ids,
            allow_length_normalised=self.allow_length_normalised,
            id_map=Path(self.id_map) if self.id_map else None,
            scratch=scratch,
            settled=settled,
            block=self.block,
        )


@dataclass(frozen=True)
class Sample:
    """One source and how to read it.

    Attributes
    ----------
    path : Path
    options : Options
    obs : mapping
        Metadata that the sheet gives to all cells of the file; it stands above the file's own.
    """

    path: Path
    options: Options
    obs: Mapping[str, str] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Return what `from_json` reads."""
        return {"path": str(self.path.absolute()), "options": asdict(self.options), "obs": dict(self.obs)}

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> "Sample":
        """Read what `to_json` gave."""
        options = {**content["options"], "neighbours": tuple(content["options"]["neighbours"])}
        return cls(Path(content["path"]), Options(**options), content["obs"])


@dataclass(frozen=True)
class State:
    """What says that a source is still the one that was looked at; of a folder, over all its files."""

    size: int
    modified: int
    inode: int

    @classmethod
    def of(cls, path: Path) -> "State":
        """Look at a file or folder."""
        stat = os.stat(path)
        if not path.is_dir():
            return cls(stat.st_size, stat.st_mtime_ns, stat.st_ino)
        stats = [os.stat(file) for file in sorted(path.rglob("*")) if file.is_file()]
        return cls(sum(s.st_size for s in stats), max((s.st_mtime_ns for s in stats), default=0), stat.st_ino)


def read_sheet(sheet: str | os.PathLike[str], options: Options) -> list[Sample]:
    """Read a sheet of samples: CSV with a column `path` (relative to the sheet) and, as wished, `counts`, `gene_ids`
    and columns of metadata for all cells of a file. An empty field says nothing.

    Raises
    ------
    UsageError
        No such sheet, no column `path`, or a file that is not there.
    DataError
        A line with another number of fields than the head, or not UTF-8.
    """
    path = Path(sheet)
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            lines = list(csv.reader(file))
    except OSError as error:
        raise UsageError(f"{path}: cannot be read ({error.strerror}); give a CSV file with a column path") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path}: no CSV in UTF-8 ({error}); save it as such") from None
    head = [name.strip() for name in lines[0]] if lines else []
    if "path" not in head or len(set(head)) < len(head):
        raise UsageError(f"{path}: needs one column named path, and no name twice; its head is {', '.join(head)}")
    samples = []
    for number, line in enumerate(lines[1:], 2):
        if not any(field.strip() for field in line):
            continue
        if len(line) != len(head):
            raise DataError(f"{path}, line {number}: {len(line)} fields, the head has {len(head)}; fix the line")
        fields = {name: text.strip() for name, text in zip(head, line, strict=True) if text.strip()}
        if "path" not in fields or not (file_path := path.parent / fields["path"]).exists():
            raise UsageError(f"{path}, line {number}: no such file {fields.get('path', '')!r}; fix the path")
        counts, gene_ids = (fields.get(name, getattr(options, name)) for name in ("counts", "gene_ids"))
        obs = {name: text for name, text in fields.items() if name not in _OWN}
        samples.append(Sample(file_path, replace(options, counts=counts, gene_ids=gene_ids), obs))
    return samples
