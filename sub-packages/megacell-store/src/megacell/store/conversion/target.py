# SPDX-License-Identifier: Apache-2.0
"""The folder that a conversion writes to: new, left unfinished by a killed one, or a store to append to."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megacell.core.errors import DataError, KilledError, UsageError
from megacell.core.files import TEMPORARY, flush_directory, list_folder, remove_tree
from megacell.store.conversion.plan import load_plan
from megacell.store.format.graph import FOLDER as GRAPHS
from megacell.store.format.links import refuse_links
from megacell.store.format.lock import NAME as LOCK
from megacell.store.format.lock import writing
from megacell.store.format.manifest import NAME, Manifest, generation_name
from megacell.store.format.shard import FOLDER

_TABLES = ("genes-", "panels-", "manifest-")  # begin the names of a generation's own files


def check_target(store: Path, *, append: bool) -> Manifest | None:
    """Return the manifest to append to, None for a store to be made.

    Raises
    ------
    UsageError
        Something else is there, or nothing to append to.
    DataError
        A store in which there are links.
    """
    refuse_links(store)
    there = (store / NAME).exists()
    if append:
        if not there:
            raise UsageError(f"{store}: no store to append to; leave --append out to make one")
        return Manifest.open(store)
    if there:
        raise UsageError(f"{store}: exists already; --append adds to it, or give another --out")
    if store.exists() and not (store.is_dir() and all(_is_ours(entry.name) for entry in store.iterdir())):
        raise UsageError(f"{store}: exists already and is not an unfinished store; give another --out")
    return None


@contextmanager
def open_target(store: Path, *, append: bool) -> Iterator[Manifest | None]:
    """Make or take the folder and lock it; yield the manifest to append to.

    A folder that did not become a store is taken away again.
    """
    store.mkdir(parents=True, exist_ok=True)
    flush_directory(store.parent)
    try:
        with writing(store):
            yield check_target(store, append=append)  # again: another conversion may have come between
    finally:
        if not (store / NAME).exists() and not any(store.iterdir()):
            store.rmdir()


@contextmanager
def naming_disk(store: Path) -> Iterator[None]:
    """Make one line, with the place, of what the system says of the disk on which a store is written."""
    try:
        yield
    except OSError as error:
        where = error.filename or store
        fix = "see to room and rights, then run it again"
        raise DataError(f"{where}: {error.strerror or error}; {fix}") from error


@contextmanager
def sweeping(store: Path) -> Iterator[None]:
    """Sweep where a writer fails."""
    try:
        yield
    except KilledError:
        if load_plan(store) is None and not any(store.glob(f"compaction-*{TEMPORARY}")):
            sweep(store)  # there is nothing that the next run could go on with
        raise
    except Exception:  # not Ctrl-C, after which the next run goes on with the plan
        sweep(store)
        raise


def sweep(store: Path) -> None:
    """Remove what a writer that failed or was killed left: every file of ours that no generation's manifest names.

    The manifest is read here and now: a conversion may have failed after its commit, and then its files are named.
    """
    manifest = Manifest.open(store) if (store / NAME).exists() else None
    named = {NAME, LOCK}
    if manifest:
        named |= {generation_name(manifest.generation), *manifest.files}
    _sweep_folders(store, manifest)
    for name in list_folder(store):
        folder = (store / name).is_dir() and not (store / name).is_symlink()
        ours = name not in named and name.startswith((*_TABLES, LOCK)) and not folder
        if ours or name.endswith(TEMPORARY):  # of folders: a plan, a transposed matrix
            remove_tree(store, name)


def _sweep_folders(store: Path, manifest: Manifest | None) -> None:
    """Remove shards and graphs that no generation names; earlier manifests are read only where that is in doubt."""
    left = {f"{folder}/{name}" for folder in (FOLDER, GRAPHS) for name in list_folder(store, folder)}
    left -= manifest.folders if manifest else set()
    for name in reversed(manifest.earlier if manifest else ()):
        if left:
            left -= Manifest.read(store, name).folders
    for name in sorted(left):
        remove_tree(store, name)
    for folder in (FOLDER, GRAPHS):
        if (store / folder).exists() and not list_folder(store, folder):
            (store / folder).rmdir()


def _is_ours(name: str) -> bool:
    return name in (FOLDER, GRAPHS) or name.startswith((LOCK, NAME, *_TABLES)) or name.endswith(TEMPORARY)
