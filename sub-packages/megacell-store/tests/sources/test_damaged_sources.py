# SPDX-License-Identifier: Apache-2.0
"""A damaged file is refused in one line that names it, or gives what others read of it: never a wrong store."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ENV = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}


def fuzz(folder: Path, every: int, *forms: str) -> list[dict]:
    script = Path(__file__).parents[1] / "fuzz_sources.py"
    command = [sys.executable, script, folder, str(every), *forms]
    answer = subprocess.run(command, capture_output=True, text=True, env=ENV, check=False)
    assert answer.returncode == 0, answer.stderr
    return [json.loads(line) for line in answer.stdout.splitlines()]


def check(found: list[dict]) -> int:
    """Return how many variants were judged; none may have gone wrong."""
    assert [line for form in found for line in form["wrong"]] == []
    return sum(form["refused"] + form["stores"] for form in found)


def test_some_damaged_files_of_the_commonest_layout(tmp_path):
    assert check(fuzz(tmp_path, 13, "h5ad csr gzip")) >= 12


@pytest.mark.exhaustive
def test_every_damaged_file_of_every_format(tmp_path):
    found = fuzz(tmp_path, 1)
    check(found)
    judged = {form["form"]: form["refused"] + form["stores"] for form in found}
    assert sum(n for form, n in judged.items() if form.startswith("h5ad ")) >= 500
    assert min(judged.values()) >= 24
    assert min(sum(form[kind] for form in found) for kind in ("refused", "stores")) >= 100


DYING = """
import os, signal, sys
from pathlib import Path
from megacell.store import CellStore, convert
from megacell.store.conversion import tasks
from megacell.store.processes import watchdog
from megacell.store.sources import source

death, stage, workers, store, *files = sys.argv[1:]
watchdog.SECONDS = 1.0
real_open, real_check = source.open_container, tasks.check_unchanged

def die():
    if death == "SIGSEGV":
        os.kill(os.getpid(), signal.SIGSEGV)
    with watchdog.watched():
        while True:
            pass

def opened(path, block=0):
    if stage == "look" and Path(path).name == "bad.h5ad":
        die()
    return real_open(path, block)

def checked(found):
    if stage == "shard" and found.path.name == "bad.h5ad":
        die()
    return real_check(found)

source.open_container, tasks.check_unchanged = opened, checked
if __name__ == "__main__":
    report = convert(files, store, workers=int(workers), allow_subset=True, skip_bad=True, shard_bytes=20_000)
    for line in report.left_out:
        print("left out:", line)
    print(len(CellStore.open(store)), "cells left")
"""


@pytest.mark.parametrize("death", ["SIGSEGV", "SIGVTALRM"], ids=["a crash", "a call that never returns"])
@pytest.mark.parametrize(
    ("stage", "workers"),
    [("look", 1), ("shard", 1), pytest.param("shard", 2, marks=pytest.mark.exhaustive)],
    ids=["at the first look", "further on", "further on, in one of two processes"],
)
def test_a_file_that_ends_the_process_that_reads_it_is_refused_by_name(death, stage, workers, made, save, tmp_path):
    """What HDF5 does with a few damaged files, made certain."""
    files = [save(made.counts(60, 300, seed=i), f"{name}.h5ad") for i, name in enumerate(("good", "bad", "other"))]
    script = tmp_path / "run.py"
    script.write_text(DYING)
    command = [sys.executable, script, death, stage, str(workers), tmp_path / "store", *files]
    answer = subprocess.run(command, capture_output=True, text=True, env=ENV, check=False, timeout=300)
    assert answer.stdout.strip().endswith("120 cells left"), answer.stdout + answer.stderr
    (line,) = [line for line in answer.stdout.splitlines() if line.startswith("left out: ")]
    assert "bad.h5ad: cannot be read" in line
    assert death in line
