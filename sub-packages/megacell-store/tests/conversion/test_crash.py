# SPDX-License-Identifier: Apache-2.0
"""Killed, out of room, or with files that change: there is the old store or the new one, and nothing half written."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest

from megacell.core import files as durable
from megacell.core.errors import DataError
from megacell.store import CellStore, convert
from megacell.store.conversion import conversion
from megacell.store.format.lock import NAME as LOCK
from megacell.store.format.verify import verify

ALLOWED = {"allow_subset": True}
PATH = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}


@pytest.mark.parametrize("limit", [300, 5_000, 60_000], ids=["at once", "in a shard", "in the tables"])
@pytest.mark.parametrize("append", [False, True], ids=["new store", "append"])
def test_a_full_disk_is_one_line_and_leaves_nothing(limit, append, counts, made, save, tmp_path):
    new = save(made.counts(2000, 300, seed=2) if limit == 60_000 else counts, "new.h5ad")
    store = tmp_path / "store"
    if append:
        convert(save(made.counts(50, 300, seed=1), "old.h5ad"), store, **ALLOWED)
    before = {path: path.read_bytes() for path in store.rglob("*") if path.is_file()}
    code = f"""
import resource, sys
from megacell.core.cli.main import main
from megacell.store.conversion import conversion
resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))
sys.exit(main(["convert", {str(new)!r}, "--out", {str(store)!r}, "--allow-subset"] + ["--append"] * {append}))
"""
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=PATH, check=False)
    assert answer.returncode == 1, answer.stdout + answer.stderr
    assert len(answer.stderr.strip().splitlines()) == 1
    assert "File too large" in answer.stderr
    assert {path: path.read_bytes() for path in store.rglob("*") if path.is_file()} == before
    assert store.exists() == append


def test_a_file_that_changes_while_it_is_read_is_refused(counts, save, tmp_path, monkeypatch):
    path = save(counts)
    real = conversion.attempt

    def meddle(*args):
        record = real(*args)
        os.utime(path, (1, 1))
        return record

    monkeypatch.setattr(conversion, "attempt", meddle)
    with pytest.raises(DataError, match=r"made\.h5ad: changed while it was read"):
        convert(path, tmp_path / "store", **ALLOWED)
    assert not (tmp_path / "store").exists()


def test_an_error_after_the_commit_harms_nothing(counts, made, save, tmp_path, monkeypatch):
    store = tmp_path / "store"
    convert(save(counts, "old.h5ad"), store, **ALLOWED)
    real = durable.write_whole

    def interrupted(path, content):
        real(path, content)
        if path.name == "manifest.json":
            raise KeyboardInterrupt

    monkeypatch.setattr("megacell.store.format.manifest.write_whole", interrupted)
    with pytest.raises(KeyboardInterrupt):
        convert(save(made.counts(20, 300, seed=3), "new.h5ad"), store, append=True, **ALLOWED)
    assert verify(store).damages == []
    assert len(CellStore.open(store)) == 80


def test_an_error_in_a_later_file_leaves_nothing_of_the_earlier_ones(counts, made, save, tmp_path, monkeypatch):
    monkeypatch.setattr("megacell.store.sources.choice.SAMPLE_RUNS", 1)
    bad = made.counts(60, 300, seed=3)
    bad[55, 5] = np.nan
    store = tmp_path / "store"
    convert(save(counts, "old.h5ad"), store, **ALLOWED)
    before = sorted(store.rglob("*"))
    files = [save(made.counts(60, 300, seed=4), "good.h5ad"), save(bad, "bad.h5ad")]
    with pytest.raises(DataError, match=r"bad\.h5ad.*NaN"):
        convert(files, store, append=True, shard_bytes=1000, **ALLOWED)
    assert sorted(store.rglob("*")) == before


def test_all_refused_files_are_named_at_once(counts, made, save, tmp_path):
    good = save(counts, "good.h5ad")
    bad = [save(-made.counts(60, 300, seed=i), f"bad{i}.h5ad") for i in range(2)]
    with pytest.raises(
        DataError, match=r"2 of 3 files refused \(--skip-bad leaves them out\): .*bad0\.h5ad.* \| .*bad1\.h5ad"
    ) as raised:
        convert([good, *bad], tmp_path / "store", **ALLOWED)
    assert "\n" not in str(raised.value)
    report = convert([good, *bad], tmp_path / "store", dry_run=True, **ALLOWED)
    assert [i.refused is None for i in report.inspections] == [True, False, False]
    assert not (tmp_path / "store").exists()


def test_two_writers_never_meet(counts, save, tmp_path, monkeypatch):
    path, store = save(counts), tmp_path / "store"
    real = conversion.attempt

    def second_writer(*args):
        with pytest.raises(DataError, match="another conversion is writing here"):
            convert(path, store, **ALLOWED)
        return real(*args)

    monkeypatch.setattr(conversion, "attempt", second_writer)
    convert(path, store, **ALLOWED)
    assert len(CellStore.open(store)) == 60
    assert not [p.name for p in store.iterdir() if p.name.startswith(LOCK)]


@pytest.mark.parametrize(
    ("lock", "reason"),
    [
        ({"where": "another machine", "pid": 1, "started": "1", "token": "a"}, "another conversion is writing here"),
        ("scribble", "not a lock of ours"),
        ({"pid": 1}, "not a lock of ours"),
    ],
    ids=["of another machine", "not JSON", "not whole"],
)
def test_a_lock_that_cannot_be_judged_is_respected(lock, reason, counts, save, tmp_path):
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / LOCK).write_text(lock if isinstance(lock, str) else json.dumps(lock))
    with pytest.raises(DataError, match=reason):
        convert(save(counts), tmp_path / "store", **ALLOWED)


@pytest.mark.parametrize("size", [0, 1, 100, 0.3, 0.9], ids=["empty", "a byte", "a header", "a third", "nearly all"])
def test_a_truncated_file_is_refused_by_name(size, counts, save, tmp_path):
    path = save(counts)
    content = path.read_bytes()
    path.write_bytes(content[: int(size * len(content)) if isinstance(size, float) else size])
    with pytest.raises(DataError, match=r"made\.h5ad: .*(truncated|is empty)"):
        convert(path, tmp_path / "store", **ALLOWED)
    assert not (tmp_path / "store").exists()


def test_a_damaged_file_is_an_error_of_ours_or_a_whole_store(counts, save, tmp_path):
    """Never another exception, and never a store that is not whole: bits of the file's structure are flipped."""
    path = save(counts)
    content, random = path.read_bytes(), np.random.default_rng(0)
    refused = []
    for number in range(40):
        damaged = bytearray(content)
        for position in random.integers(0, min(len(content), 20_000), 3):
            damaged[position] ^= 1 << random.integers(8)
        path.write_bytes(bytes(damaged))
        try:
            convert(path, tmp_path / f"store-{number}", **ALLOWED)
            assert verify(tmp_path / f"store-{number}").damages == []
        except DataError as error:
            refused.append(str(error))
            assert not (tmp_path / f"store-{number}").exists()
    assert refused
    assert all("made.h5ad" in line and "\n" not in line for line in refused)


@pytest.mark.parametrize(
    ("content", "reason"),
    [(b"cell,gene\n1,2\n", "is not an HDF5 file"), (b"\x89PNG\r\n\x1a\n" + b"\0" * 4000, "is not an HDF5 file")],
    ids=["text", "a picture"],
)
def test_what_is_no_hdf5_is_refused(content, reason, tmp_path):
    path = tmp_path / "notes.h5ad"
    path.write_bytes(content)
    with pytest.raises(DataError, match=rf"notes\.h5ad: {reason}"):
        convert(path, tmp_path / "store")


def test_hdf5_that_is_no_anndata_is_refused(tmp_path):
    import h5py

    with h5py.File(tmp_path / "other.h5ad", "w") as file:
        file["matrix"] = np.ones((3, 3))
    with pytest.raises(DataError, match=r"other\.h5ad: has no obs, so it is no \.h5ad file"):
        convert(tmp_path / "other.h5ad", tmp_path / "store")


def test_a_file_without_cells_is_refused(made, save, tmp_path):
    with pytest.raises(DataError, match=r"made\.h5ad: holds 0 cells"):
        convert(save(made.counts(5, 300)[:0]), tmp_path / "store", **ALLOWED)
