# SPDX-License-Identifier: Apache-2.0
"""Which earlier generations a store can let go, and what it no longer needs then."""

import time
from pathlib import Path

from megacell.store.format.manifest import FileRecord, Manifest, generation_name

OLDER_THAN = 24.0  # hours since a generation was replaced, before which its readers may still open shards of it


def reading_of(store: Path, manifest: Manifest) -> dict[str, Manifest]:
    """Return the generations that can be opened once `manifest` is replaced, by their manifests' names, oldest first.

    Raises
    ------
    DataError
        An earlier manifest that cannot be read.
    """
    return {name: Manifest.read(store, name) for name in manifest.earlier} | {
        generation_name(manifest.generation): manifest
    }


def own_bytes(earlier: dict[str, Manifest], new: Manifest) -> int:
    """Return the bytes of shards and graphs that only earlier generations have."""
    new_files = dict(new.own_files())
    old_files: dict[str, FileRecord] = {}
    for manifest in earlier.values():
        old_files |= manifest.own_files()
    return sum(record.bytes for name, record in old_files.items() if "/" in name and name not in new_files)


def outdated(store: Path, earlier: dict[str, Manifest], new: Manifest, older_than: float) -> set[str]:
    """Return the earlier generations to let go: those replaced so many hours ago that have folders of their own.

    One whose folders are all needed by the new generation, or by one replaced later than that, costs nothing and stays.
    """
    names = list(earlier)
    recent = set()
    for name, successor in zip(names, [*names[1:], None], strict=True):
        replaced = (store / successor).stat().st_mtime if successor else time.time()
        if older_than > 0 and time.time() - replaced < older_than * 3600:
            recent.add(name)
    needed = new.folders.union(*(earlier[name].folders for name in recent))
    return {name for name in names if name not in recent and not earlier[name].folders <= needed}


def needed_files(files: dict[str, FileRecord], earlier: dict[str, Manifest], new: Manifest) -> dict[str, FileRecord]:
    """Return those files at a store's top that the new generation and these earlier ones need."""
    names = {new.genes_file, new.panels_file}
    for name, manifest in earlier.items():
        names |= {name, manifest.genes_file, manifest.panels_file}
    return {name: record for name, record in files.items() if name in names}
