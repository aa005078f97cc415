# SPDX-License-Identifier: Apache-2.0
"""Small stores and files of real cells, and what an attacker does to them: valid checksums, hostile content."""

import json
import os
import pickle
import shutil
import signal
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import scipy.sparse as sp
import xxhash

from megacell.core.errors import MegacellError
from megacell.store import convert

CELLS = 40
SOURCES = ("pbmc4k_a", "pbmc5k_protein")


def some_cells(data: Path, name: str = SOURCES[0]) -> ad.AnnData:
    """Return a few real cells with a graph between them."""
    cells = ad.read_h5ad(data / "cells" / f"{name}.h5ad")[:CELLS].copy()
    cells.obsp["distances"] = sp.random(CELLS, CELLS, 0.1, "csr", np.float32, random_state=0)
    return cells


def write_files(folder: Path, data: Path) -> list[Path]:
    """Write the first cells of each source as .h5ad."""
    folder.mkdir()
    paths = [folder / f"{name}.h5ad" for name in SOURCES]
    for path in paths:
        some_cells(data, path.stem).write_h5ad(path)
    return paths


def make_store(path: Path, files: Iterable[Path], graphs: Iterable[str] = ("distances",)) -> Path:
    """Convert each file as a generation of its own: a store of several shards, earlier manifests and graphs."""
    for number, file in enumerate(files):
        convert(file, path, append=number > 0, neighbours=graphs)
    return path


def rewrite(store: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    """Change a manifest; measure the files that it and earlier ones name anew, and sign all: checksums are right."""
    manifest = json.loads((store / "manifest.json").read_bytes())
    for name in manifest["earlier"]:
        earlier = json.loads((store / name).read_bytes())
        (store / name).write_bytes(_signed(store, earlier))
    edit(manifest)
    text = _signed(store, manifest)
    for name in ("manifest.json", f"manifest-{manifest['generation']}.json"):
        (store / name).write_bytes(text)


def _signed(store: Path, manifest: dict[str, Any]) -> bytes:
    for shard in manifest["shards"]:
        _measure(store / "shards" / shard["name"], shard["files"])
    for name, graph in dict(manifest["neighbours"]).items():
        _measure(store / "neighbours" / name, graph["files"] if isinstance(graph, dict) else {})
    _measure(store, manifest["files"])
    manifest["checksum"] = "0" * 16
    text = json.dumps(manifest, indent=1).encode() + b"\n"
    return text.replace(b'"checksum": "' + b"0" * 16, b'"checksum": "' + xxhash.xxh3_64_hexdigest(text).encode())


def _measure(folder: Path, records: dict[str, Any]) -> None:
    for name, record in records.items():
        if (folder / name).is_file():
            content = (folder / name).read_bytes()
            record |= {"bytes": len(content), "xxh3": xxhash.xxh3_64_hexdigest(content)}


def rewrite_array(store: Path, path: str, change: Callable[[np.ndarray], np.ndarray]) -> None:
    """Change one array of a store, and what the manifest says of it."""
    array = np.asarray(change(np.load(store / path)))
    np.save(store / path, array)
    folder, name, file = path.split("/")

    def record(manifest: dict[str, Any]) -> None:
        shards = {shard["name"]: shard for shard in manifest["shards"]}
        holder = shards[name] if folder == "shards" else manifest["neighbours"][name]
        holder["files"][file] |= {"dtype": array.dtype.name, "shape": list(array.shape)}

    rewrite(store, record)


def move_behind_link(path: Path, elsewhere: Path) -> Path:
    """Move a file or folder away, put a link to it in its place, and return where it is."""
    elsewhere.mkdir(exist_ok=True)
    moved = elsewhere / path.name
    shutil.move(path, moved)
    path.symlink_to(moved)
    return moved


def listing(folder: Path) -> dict[str, bytes]:
    """Return all files below a folder by their paths."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def outcome(act: Callable[[], object]) -> str:
    """Say what becomes of an act in a process of its own, which it may end: "good", "refused: …", "SIGSEGV", …."""
    reading, writing = os.pipe()
    pid = os.fork()
    if not pid:
        try:
            act()
            said = "good"
        except MegacellError as error:
            said = f"refused: {error}"
        except BaseException as error:
            said = f"{type(error).__name__}: {error}"
        os.write(writing, pickle.dumps(said[:2000]))
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        content = pipe.read()
    _, status = os.waitpid(pid, 0)
    if os.WIFSIGNALED(status):
        return signal.Signals(os.WTERMSIG(status)).name
    return str(pickle.loads(content))
