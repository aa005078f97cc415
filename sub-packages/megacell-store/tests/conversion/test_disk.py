# SPDX-License-Identifier: Apache-2.0
"""A disk that is full or may only be read, and files that change while they are read."""

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import scipy.sparse as sp
from layouts import small_blocks

from megacell.core.errors import DataError
from megacell.store import convert
from megacell.store.format.shard import ShardWriter

ALLOWED = {"allow_subset": True}
ENV = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
MOUNT = ["unshare", "--user", "--map-root-user", "--mount"]


def can_mount() -> bool:
    if shutil.which("unshare") is None:
        return False
    return (
        subprocess.run([*MOUNT, "mount", "-t", "tmpfs", "tmpfs", "/mnt"], capture_output=True, check=False).returncode
        == 0
    )


needs_mount = pytest.mark.skipif(not can_mount(), reason="this system lets no user mount a file system of its own")

# runs with a small file system of its own at FOLDER/disk, which nobody else sees
FULL = """
import contextlib, io, json, os, sys
from pathlib import Path
from megacell.core.cli.main import main
from megacell.core.files import hash_file

folder, append, every = Path(sys.argv[1]), sys.argv[2] == "append", int(sys.argv[3])
disk, store = folder / "disk", folder / "disk" / "store"

def tree():
    return {str(p): hash_file(p) if p.is_file() else "" for p in disk.rglob("*") if p.name != "ballast"}

def run(name, *more):
    errors = io.StringIO()
    with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(io.StringIO()):
        code = main(["convert", str(folder / name), "--out", str(store), "--allow-subset", "--workers", "1", *more])
    return code, errors.getvalue().strip().splitlines()

more = ["--append"] if append else []
if append:
    assert run("old.h5ad") == (0, [])
before, full = tree(), 0
for pages in range(0, 4000, every):
    left = os.statvfs(disk).f_bavail - pages  # pages left to the conversion
    with open(disk / "ballast", "wb") as file:
        os.posix_fallocate(file.fileno(), 0, max(1, left * 4096))
    code, lines = run("new.h5ad", *more)
    (disk / "ballast").unlink()
    if code == 0:
        break
    assert code == 1 and len(lines) == 1 and str(disk) in lines[0] and "No space left" in lines[0], (pages, code, lines)
    assert tree() == before, (pages, sorted(set(tree()) ^ set(before)))
    full += 1
print(json.dumps({"full": full, "code": code}))
"""


@needs_mount
@pytest.mark.parametrize("every", [23, pytest.param(2, marks=pytest.mark.exhaustive)], ids=["now and then", "anywhere"])
@pytest.mark.parametrize("task", ["new", "append"])
@pytest.mark.parametrize("layout", ["csr", "csc"])
def test_a_disk_that_fills_up_leaves_what_was_there(layout, task, every, made, save, tmp_path):
    """Real want of room, on a file system of eight megabytes that ever more of is free."""
    kind = sp.csr_matrix if layout == "csr" else sp.csc_matrix
    save(made.anndata(kind(made.counts(200, 300, seed=1))), "old.h5ad")
    save(made.anndata(kind(made.counts(900, 300, seed=2))), "new.h5ad")
    (tmp_path / "disk").mkdir()
    (tmp_path / "full.py").write_text(FULL)
    mount = 'mount -t tmpfs -o size=8M tmpfs "$0/disk" && exec "$@"'
    command = [sys.executable, tmp_path / "full.py", tmp_path, task, str(every)]
    answer = subprocess.run(
        [*MOUNT, "sh", "-c", mount, tmp_path, *command], capture_output=True, text=True, env=ENV, check=False
    )
    assert answer.returncode == 0, answer.stderr
    found = json.loads(answer.stdout)
    assert found["code"] == 0
    assert found["full"] >= (3 if every > 2 else 30)


READ_ONLY = """
import sys
from pathlib import Path
from megacell.store import CellStore
from megacell.core.cli.main import main
from megacell.store.format.verify import verify

folder = Path(sys.argv[1])
store = CellStore.open(folder / "disk/store")
print(int(store.rows(slice(None)).sum()), verify(folder / "disk/store").damages, flush=True)
for out, more in (("disk/store", ["--append"]), ("disk/other", []), ("disk/other", ["--part", "1/2"])):
    print(main(["convert", str(folder / "new.h5ad"), "--out", str(folder / out), "--allow-subset", *more]), flush=True)
"""


@needs_mount
def test_a_store_on_a_read_only_disk_is_read_and_nothing_is_written_there(counts, made, save, tmp_path):
    save(made.counts(50, 300, seed=2), "new.h5ad")
    (tmp_path / "disk").mkdir()
    convert(save(counts), tmp_path / "disk/store", **ALLOWED)
    (tmp_path / "read.py").write_text(READ_ONLY)
    mount = 'mount --bind "$0/disk" "$0/disk" && mount -o remount,bind,ro "$0/disk" && exec "$@"'
    command = [*MOUNT, "sh", "-c", mount, tmp_path, sys.executable, tmp_path / "read.py", tmp_path]
    answer = subprocess.run(command, capture_output=True, text=True, env=ENV, check=False)
    assert answer.stdout.splitlines() == [f"{int(counts.sum())} []", "1", "1", "1"], answer.stderr
    lines = answer.stderr.strip().splitlines()
    assert len(lines) == 3
    assert all("disk/" in line and "Read-only file system" in line for line in lines)


CHANGES = {
    "touched": lambda path: os.utime(path, (1, 1)),
    "cut short": lambda path: os.truncate(path, path.stat().st_size // 2),
    "grown": lambda path: path.open("ab").write(b"more"),
    "replaced": lambda path: os.replace(shutil.copy(path, path.with_suffix(".new")), path),
    "gone": lambda path: path.unlink(),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_file_that_changes_while_it_is_read_is_refused(change, counts, save, tmp_path, monkeypatch):
    path, real = save(counts), ShardWriter.add

    def add(self, *args):
        real(self, *args)
        if path.exists() and not (tmp_path / "done").exists():
            (tmp_path / "done").touch()
            CHANGES[change](path)

    monkeypatch.setattr(ShardWriter, "add", add)
    small_blocks(monkeypatch, 2000)
    with pytest.raises(DataError, match=r"made\.h5ad: (changed while it was read|.*cannot be read)"):
        convert(path, tmp_path / "store", **ALLOWED)
    assert not (tmp_path / "store").exists()
    monkeypatch.undo()
    if change in ("touched", "replaced"):
        convert(path, tmp_path / "store", **ALLOWED)
        assert np.load(tmp_path / "store/shards/00000/indptr.npy")[-1] == np.count_nonzero(counts)
