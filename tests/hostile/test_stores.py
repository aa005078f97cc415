# SPDX-License-Identifier: Apache-2.0
"""A store that was made elsewhere, to harm who opens it: nothing outside it is touched, and no process ends of it."""

import errno
import json
import os
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from stores_made import listing, make_store, move_behind_link, outcome, rewrite, rewrite_array, write_files

from megacell.core.cli.main import main
from megacell.core.errors import DataError, UsageError
from megacell.store import CellStore, convert
from megacell.store.conversion import inspection
from megacell.store.format import manifest as manifest_file
from megacell.store.format.verify import verify
from megacell.store.maintain.compaction import compact


@pytest.fixture(scope="module")
def files(data, tmp_path_factory) -> list[Path]:
    """Two files of a few real cells."""
    return write_files(tmp_path_factory.mktemp("files") / "cells", data)


@pytest.fixture(scope="module")
def made(files, tmp_path_factory) -> Path:
    """A store of two shards, each a generation of its own, with a graph."""
    store = make_store(tmp_path_factory.mktemp("made") / "cells.store", files)
    read_all(store)  # compiles what the processes of the tests run
    return store


@pytest.fixture
def store(made, tmp_path) -> Path:
    """A copy of it, to be made hostile."""
    return Path(shutil.copytree(made, tmp_path / "cells.store"))


@pytest.fixture
def more(files, tmp_path) -> Path:
    """A file to append."""
    import anndata

    cells = anndata.read_h5ad(files[0])[5:].copy()
    cells.write_h5ad(tmp_path / "more.h5ad")
    return tmp_path / "more.h5ad"


def read_all(path: Path) -> None:
    """Read everything that a store has."""
    store = CellStore.open(path)
    store.gather(slice(None))
    store.rows(np.arange(len(store))[::-1])
    _ = store.obs, store.source_of, store.cell_hash, store.gene_ids
    store.obs_slice(None, 1, len(store))
    for source in range(len(store.sources)):
        store.panel(source)
    for name in store.manifest.graphs:
        graph = store.neighbours(name)
        graph.rows(slice(None))
        graph.sample(slice(None), 3, weighted=False)
        graph.of(0)
    CellStore.open(path, 1).rows([0])
    list(store.stored(0, len(store)))


WRITERS = {
    "append": lambda store, more: convert(more, store, append=True),
    "compact": lambda store, _: compact(store),
    "prune": lambda store, _: compact(store, prune=True, older_than=0),
}
LINKED = (
    *("shards", "shards/00000", "shards/00000/counts.npy", "shards/00001/obs.parquet", "shards/00001/panels.npy"),
    *("neighbours", "neighbours/distances-2", "neighbours/distances-2/indices.npy"),
    *("manifest.json", "manifest-1.json", "manifest-2.json", "genes-2.parquet", "panels-2.parquet"),
)


@pytest.mark.parametrize("name", LINKED)
def test_a_store_with_a_link_is_read_by_none_and_written_by_none(name, store, more, tmp_path):
    move_behind_link(store / name, tmp_path / "victim")
    (tmp_path / "victim/thesis").mkdir()
    (tmp_path / "victim/thesis/a.txt").write_text("precious")
    before, own = listing(tmp_path / "victim"), sorted(store.rglob("*"))
    for write in WRITERS.values():
        with pytest.raises(DataError, match=rf"cells\.store/{name}: a link"):
            write(store, more)
    assert listing(tmp_path / "victim") == before
    assert sorted(store.rglob("*")) == own
    if name == "manifest-2.json":  # a copy of manifest.json, which nobody opens
        read_all(store)
    else:
        with pytest.raises(DataError, match=rf"cells\.store/{name}: a link"):
            read_all(store)
    if name == "manifest.json":
        return
    damages = verify(store).damages
    assert [line for line in damages if line.startswith(f"{store / name}: a link")], damages
    assert len(damages) == 1


@pytest.mark.parametrize("name", ["neighbours", "shards/99999", "neighbours/distances-9", "manifest-9.json"])
def test_a_link_that_no_manifest_names_leads_no_sweep_away(name, files, more, tmp_path):
    store = make_store(tmp_path / "cells.store", files[:1], graphs=["distances"] if "/" in name else [])
    victim = tmp_path / "victim"
    for folder in ("thesis", "photos"):
        (victim / folder).mkdir(parents=True)
        (victim / folder / "a").write_text("precious")
    before = listing(victim)
    (store / name).symlink_to(victim)
    for write in WRITERS.values():
        with pytest.raises(DataError, match=rf"cells\.store/{name}: a link"):
            write(store, more)
    assert listing(victim) == before
    assert any(f"{store / name}: a link" in line for line in verify(store).damages)


def test_links_in_the_place_of_unfinished_work_are_removed_as_links(store, more, tmp_path):
    victim = tmp_path / "victim"
    (victim / "deep").mkdir(parents=True)
    (victim / "deep/a").write_text("precious")
    digest = json.loads((store / "manifest.json").read_bytes()) and CellStore.open(store).digest
    names = [
        *("plan.tmp", "rows-x.tmp", "manifest.json-00.tmp", "shards/00002-0123.tmp", "neighbours/distances-3.tmp"),
        f"compaction-{digest}-{2 << 30}.tmp",
    ]
    for name in names:
        (store / name).symlink_to(victim)
    before = listing(victim)
    assert compact(store).merged == 2
    for name in names:
        assert not (store / name).is_symlink(), name
        (store / name).symlink_to(victim)
    assert convert(more, store, append=True).generation == 4
    assert listing(victim) == before
    assert not [name for name in names if (store / name).is_symlink()]
    assert not verify(store).damages


def test_a_plan_behind_a_link_is_not_gone_on_with(files, tmp_path):
    out, victim = tmp_path / "new.store", tmp_path / "victim"
    victim.mkdir()
    out.mkdir()
    (victim / "plan.json").write_text("{}")
    (out / "plan.tmp").symlink_to(victim)
    convert(files[0], out)
    assert listing(victim) == {"plan.json": b"{}"}


# content that all checksums agree with


def shard(name: str, change):
    """Return what changes an array of the second shard, which the first generation does not name."""
    return lambda store: rewrite_array(store, f"shards/00001/{name}.npy", change)


def graph(name: str, change):
    """Return what changes an array of the graph."""
    return lambda store: rewrite_array(store, f"neighbours/distances-2/{name}.npy", change)


def as_fractions(change):
    """Return what makes of the second shard's counts real numbers, changed."""

    def act(store: Path) -> None:
        rewrite_array(store, "shards/00001/counts.npy", lambda a: change(a.astype("f4")))

        def forget(manifest) -> None:
            for name in ("overflow_positions.npy", "overflow_values.npy"):
                manifest["shards"][1]["files"].pop(name)

        rewrite(store, forget)

    return act


def put(value: float):
    """Return what puts a value to every third place."""

    def change(array: np.ndarray) -> np.ndarray:
        array[::3] = value
        return array

    return change


def edit(change):
    """Return what changes the manifest."""
    return lambda store: rewrite(store, change)


def with_header(shift: int):
    """Return what moves an array's values by some bytes behind a header of another length."""

    def act(store: Path) -> None:
        path = store / "shards/00001/indptr.npy"
        values, length = np.load(path), 128 + shift
        text = f"{{'descr': '<i8', 'fortran_order': False, 'shape': ({len(values)},), }}"
        head = b"\x93NUMPY\x01\x00" + (length - 10).to_bytes(2, "little") + text.ljust(length - 11).encode() + b"\n"
        path.write_bytes(head + values.tobytes())
        rewrite(store, lambda _: None)

    return act


def nested_header(store: Path) -> None:
    """Let an array's header be nested deeply."""
    path = store / "shards/00001/indptr.npy"
    head = b"\x93NUMPY\x01\x00" + (4000).to_bytes(2, "little") + b"-" * 3999 + b"\n"
    path.write_bytes(head + path.read_bytes()[128:])
    rewrite(store, lambda _: None)


def obs_of(rows: int):
    """Return what gives the second shard a table of so many rows, a few bytes each way."""

    def act(store: Path) -> None:
        table = pa.table({"_index": pa.array(["a"]).dictionary_encode().take(pa.array(np.zeros(rows, "i4")))})
        pq.write_table(table, store / "shards/00001/obs.parquet")
        rewrite(store, lambda _: None)

    return act


def genes_of(rows: int, text: str = "a"):
    """Return what gives the store a table of so many genes, and the manifest as many."""

    def act(store: Path) -> None:
        column = pa.DictionaryArray.from_arrays(np.zeros(rows, "i4"), pa.array([text]))
        columns = dict.fromkeys(("gene_id", "symbol", "biotype"), column)
        pq.write_table(pa.table(columns), store / "genes-2.parquet", compression="zstd")
        rewrite(store, lambda manifest: manifest.update(genes=rows))

    return act


HOSTILE = {
    "gene numbers of a byte": shard("indices", lambda a: a.astype("u1")),
    "gene numbers beyond the table": shard("indices", put(65535)),
    "pointers of 32 bits": shard("indptr", lambda a: a.astype("i4")),
    "pointers that are real": shard("indptr", lambda a: a.astype("f8")),
    "pointers of no width": shard("indptr", lambda a: np.zeros((len(a), 0), "i8")),
    "pointers of two dimensions": shard("indptr", lambda a: a[:, None]),
    "pointers far away": shard("indptr", put(1 << 40)),
    "negative pointers": shard("indptr", put(-(1 << 30))),
    "pointers of the other end": shard("indptr", lambda a: a.astype(">i8")),
    "too few large counts": shard("overflow_values", lambda a: a[:0]),
    "large counts of two bytes": shard("overflow_values", lambda a: a.astype("u2")),
    "places of large counts of 32 bits": shard("overflow_positions", lambda a: a.astype("i4")),
    "marks without large counts": shard("counts", put(255)),
    "counts of complex numbers": shard("counts", lambda a: a.astype("c16")),
    "negative counts": as_fractions(put(-5)),
    "infinite counts": as_fractions(put(np.inf)),
    "counts that are no numbers": as_fractions(put(np.nan)),
    "sources that are none": shard("panels", put(4_000_000_000)),
    "too few sources": shard("panels", lambda a: a[:3]),
    "hashes of half the cells": shard("cell_hash", lambda a: a[: len(a) // 2]),
    "an array off its place": with_header(1),
    "a header nested deeply": nested_header,
    "neighbours far away": graph("indices", put(1 << 31)),
    "neighbours of a byte": graph("indices", lambda a: a.astype("u1")),
    "weights that are texts": graph("weights", lambda a: a.astype("S4")),
    "a graph's pointers far away": graph("indptr", put(1 << 40)),
    "a graph's pointers of no width": graph("indptr", lambda a: np.zeros((len(a), 0), "i8")),
    "more cells than the shards have": edit(lambda m: m.update(cells=m["cells"] + 1000)),
    "cells beyond all numbers": edit(lambda m: m["shards"][1].update(cells=1 << 70)),
    "a shard twice": edit(lambda m: (m["shards"].append(m["shards"][0]), m.update(cells=m["cells"] + 40))),
    "a column of no kind": edit(lambda m: m["obs"][0].update(kind="pickle")),
    "a category twice": edit(lambda m: m["obs"][0].update(kind="category", categories=["a", "a"])),
    "a panel that is none": edit(lambda m: m["sources"][0].update(panel=77)),
    "neighbours that are a list": edit(lambda m: m.update(neighbours=[["a", 1]])),
    "metadata of 20 million cells": obs_of(20_000_000),
    "metadata of no cell": obs_of(0),
    "8 million genes": genes_of(8_000_000),
    "genes of a megabyte each": genes_of(20_000, "x" * (1 << 20)),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_content_is_refused_whatever_its_checksums(kind, store):
    HOSTILE[kind](store)
    assert not [line for line in verify_or_none(store) if "XXH3" in line]
    begun, used = time.process_time(), resource.getrusage(resource.RUSAGE_CHILDREN)
    said = outcome(lambda: bounded(read_all, store))
    spent = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert said.startswith(f"refused: {store}"), said
    assert "\n" not in said
    assert spent.ru_utime - used.ru_utime < 20
    assert time.process_time() - begun < 20


def verify_or_none(store: Path) -> list[str]:
    """Return what `verify` finds, nothing where it refuses the manifest."""
    try:
        return verify(store).damages
    except DataError:
        return []


def bounded(act, *args) -> None:
    """Act with 12 GiB of addresses at most: what takes memory out of proportion fails."""
    resource.setrlimit(resource.RLIMIT_AS, (12 << 30, 12 << 30))
    act(*args)


@pytest.mark.parametrize("kind", ["too few sources", "marks without large counts", "gene numbers of a byte"])
def test_hostile_content_is_refused_by_the_commands_in_one_line(kind, store, capfd):
    HOSTILE[kind](store)
    assert main(["info", str(store), "--duplicates"]) in (0, 1)
    assert main(["compact", str(store)]) == 1
    lines = capfd.readouterr().err.splitlines()
    assert lines
    assert all(line.startswith("megacell ") and "internal" not in line for line in lines)


def test_a_manifest_is_bounded_in_size_and_depth(store, monkeypatch):
    text = (store / "manifest.json").read_bytes()
    (store / "manifest.json").write_bytes(b"[" * 200_000)
    with pytest.raises(DataError, match="not readable as JSON"):
        CellStore.open(store)
    (store / "manifest.json").write_bytes(text)
    monkeypatch.setattr(manifest_file, "LARGEST", len(text) - 1)
    with pytest.raises(DataError, match="at most are read"):
        CellStore.open(store)


def test_a_pipe_in_the_place_of_a_file_keeps_nobody_waiting(store):
    (store / "shards/00000/obs.parquet").unlink()
    os.mkfifo(store / "shards/00000/obs.parquet")
    with pytest.raises(DataError, match="not a plain file"):
        _ = CellStore.open(store).obs
    assert any("obs.parquet" in line for line in verify(store).damages)


# what the command line does with it

INJECTIONS = {
    "a hidden @": '{c} == "\\"" or @pd.io.common.os.system("touch {out}") == 0 or {c} == "\\""',
    "a method that writes": '{c}.to_csv("{out}")',
    "a method that pickles": '{c}.to_pickle("{out}").isna()',
    "a function": '__import__("os").system("touch {out}") == 0',
    "an attribute of a method": '{c}.str.contains.__globals__["os"].system("touch {out}") == 0',
    "apply": "{c}.apply(print)",
    "a backtick": "`a'` == @pd or `b'`",
    "a format": '"{{0.__class__}}".format({c}) == "a"',
    "a comprehension": '[x for x in open("{out}", "w")] == {c}',
    "a walrus": '(y := open("{out}", "w")) == {c}',
    "a power without end": "9 ** 9 ** 9 ** 9 > {c}",
}


@pytest.mark.parametrize("kind", INJECTIONS)
def test_a_query_on_the_command_line_runs_nothing(kind, files, made, tmp_path, capfd):
    marker = tmp_path / "ran"
    column = "n_counts" if "power" in kind else CellStore.open(made).obs_columns[0]
    query = INJECTIONS[kind].replace("{c}", column).replace("{out}", str(marker)).replace("{{", "{").replace("}}", "}")
    begun = time.process_time()
    assert main(["convert", str(files[0]), "--out", str(tmp_path / "s"), "--where", query, "--workers", "1"]) == 2
    assert not marker.exists()
    assert not (tmp_path / "s").exists()
    with pytest.raises(UsageError):
        CellStore.open(made).select(query)
    assert not marker.exists()
    assert time.process_time() - begun < 20
    assert "internal" not in capfd.readouterr().err


TITLE = "\x1b]0;owned\x07"


def test_names_from_files_are_shown_without_commands_to_the_terminal(files, tmp_path, capfd):
    import anndata

    cells = anndata.read_h5ad(files[0])
    cells.obs[f"column{TITLE}"] = "a"
    cells.obs["kind"] = f"value{TITLE}\u202e"
    source = tmp_path / f"cells{TITLE}\x9b31m.h5ad"
    cells.write_h5ad(source)
    out, more = str(tmp_path / "s"), ["--workers", "1"]
    assert main(["convert", str(source), "--out", out, "--dry-run", *more]) == 0
    assert main(["convert", str(source), "--out", out, *more]) == 0
    assert main(["convert", str(source), "--out", out, "--append", *more]) == 1
    assert main(["convert", str(source), "--out", f"{out}2", *more, "--where", "no == 1"]) == 2
    assert main(["info", out, "--duplicates"]) == 0
    assert main(["overlap", out, out]) == 0
    (Path(out) / "shards/00000/counts.npy").write_bytes(b"")
    assert main(["verify", out]) == 1
    printed = "".join(capfd.readouterr())
    assert "owned" in printed
    assert r"\x1b]0;owned\x07" in printed
    assert not [c for c in printed if not c.isprintable() and c != "\n"]


SHORTENED = """
import os, sys, numpy as np
from megacell.core.cli.bus_error import explain_bus_errors
from megacell.store import CellStore
explain_bus_errors("evaluate")
store = CellStore.open(sys.argv[1])
store.rows([0])
os.truncate(sys.argv[2], 4096)
READ
print("went on")
"""
READS = {
    "a compiled loop": "store.rows(np.arange(len(store)))",
    "NumPy": "next(store.stored(0, len(store)))[2].astype(float).sum()",
    "a thread": "import threading; t = threading.Thread(target=store.rows, args=(slice(None),)); t.start(); t.join()",
}


@pytest.mark.skipif(sys.platform != "linux", reason="the address of a bus error is found out on Linux alone")
@pytest.mark.parametrize("how", READS)
def test_a_file_that_is_cut_short_while_it_is_mapped_ends_with_one_line(how, store):
    path = store / "shards/00000/indices.npy"
    words = [sys.executable, "-c", SHORTENED.replace("READ", READS[how]), store, path]
    ended = subprocess.run(words, capture_output=True, text=True, check=False)
    assert ended.returncode == 1, ended
    assert ended.stdout == ""
    assert len(ended.stderr.splitlines()) == 1
    assert ended.stderr.startswith(f"megacell evaluate: error: {path} was cut short")


def test_a_full_disk_is_not_blamed_on_the_file_that_is_looked_at(files, tmp_path, monkeypatch):
    def full(path, _content) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    monkeypatch.setattr(inspection, "write_whole", full)
    with pytest.raises(DataError, match="No space left on device; see to room") as error:
        convert(files[0], tmp_path / "s")
    assert str(error.value).startswith(str(tmp_path / "s"))
    assert files[0].name not in str(error.value)
