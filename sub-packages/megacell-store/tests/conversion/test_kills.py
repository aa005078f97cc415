# SPDX-License-Identifier: Apache-2.0
"""Killed at any moment there is the old store or the new one, and the next conversion makes the same store."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
from sklearn.neighbors import kneighbors_graph

from megacell.core.files import hash_file
from megacell.store import CellStore, convert

ENV = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
EXHAUSTIVE = pytest.mark.exhaustive


def kill(folder: Path, scenario: str, who: str, every: int) -> dict:
    script = Path(__file__).parents[1] / "kill_everywhere.py"
    command = [sys.executable, script, folder, scenario, who, str(every)]
    answer = subprocess.run(command, capture_output=True, text=True, env=ENV, check=False)
    assert answer.returncode == 0, answer.stderr
    return json.loads(answer.stdout)


@pytest.fixture
def files(made, save) -> None:
    """The files of kill_everywhere.py: two good ones, and two that turn out other than their first cells are."""
    fractions, late = made.counts(60, 150, seed=3), made.counts(60, 150, seed=4)
    fractions[50:] *= np.float32(0.9)
    late[58, 3] = -1
    counts = {"old": made.counts(30, 200, seed=1), "new": made.counts(40, 250, seed=2)}
    for name, values in (counts | {"fractions": fractions, "late": late}).items():
        data = made.anndata(values)
        data.obsp["distances"] = kneighbors_graph(data.X, 5, mode="distance")
        save(data, f"{name}.h5ad")


@pytest.mark.parametrize(
    ("scenario", "who", "every"),
    [
        ("new", "all", 41),
        ("append", "one", 41),
        ("compact", "all", 41),
        ("prune", "all", 41),
        pytest.param("new", "all", 1, marks=EXHAUSTIVE),
        pytest.param("append", "all", 1, marks=EXHAUSTIVE),
        pytest.param("append", "one", 3, marks=EXHAUSTIVE),
        pytest.param("compact", "all", 1, marks=EXHAUSTIVE),
        pytest.param("compact", "one", 3, marks=EXHAUSTIVE),
        pytest.param("prune", "all", 1, marks=EXHAUSTIVE),
        pytest.param("parts", "all", 3, marks=EXHAUSTIVE),
        pytest.param("parts", "one", 3, marks=EXHAUSTIVE),
        pytest.param("amended", "all", 3, marks=EXHAUSTIVE),
        pytest.param("amended", "one", 3, marks=EXHAUSTIVE),
    ],
    ids=[
        "some steps of a conversion",
        "some steps of an append, one process of two",
        "some steps of a compaction",
        "some steps of a pruning",
        "each step of a conversion",
        "each step of an append",
        "an append, one process of two",
        "each step of a compaction",
        "a compaction, one process of two",
        "each step of a pruning",
        "parts and finish",
        "parts and finish, one process of two",
        "files that turn out otherwise",
        "files that turn out otherwise, one process of two",
    ],
)
def test_killed_at_any_step_there_is_the_old_store_or_the_new_one(scenario, who, every, files, tmp_path):
    found = kill(tmp_path, scenario, who, every)
    assert found["kills"] == len(range(0, found["steps"], every))
    assert found["old"] + found["absent"] >= 1
    if scenario == "prune":  # nothing is merged any more
        assert found["in a worker"] == 0
    else:
        assert 0 < found["in a worker"] < found["kills"]
    if every == 1:
        assert found["kills"] >= 60  # a compaction has the fewest steps
        assert found["new"] >= 1


RUN = """
import sys
from megacell.store import convert
if __name__ == "__main__":
    convert(sys.argv[2:], sys.argv[1], workers=2, allow_subset=True, shard_bytes=100_000)
"""


def tree(store: Path) -> dict[str, str]:
    return {path.relative_to(store).as_posix(): hash_file(path) for path in store.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("victim", "times"),
    [
        ("the parent", 1),
        pytest.param("the parent", 12, marks=EXHAUSTIVE),
        pytest.param("a worker", 12, marks=EXHAUSTIVE),
        pytest.param("all", 12, marks=EXHAUSTIVE),
    ],
    ids=lambda value: f"{value}, several times" if value == 12 else str(value),
)
def test_spawned_processes_killed_while_they_write_are_made_good(victim, times, made, save, tmp_path):
    """Whoever is killed, at whatever moment; who is left over may go on while the next conversion does its work."""
    paths = [save(made.counts(300, 600, seed=i), f"f{i}.h5ad") for i in range(4)]
    script = tmp_path / "run.py"
    script.write_text(RUN)
    convert(paths, tmp_path / "whole", allow_subset=True, shard_bytes=100_000)
    expected, random = tree(tmp_path / "whole"), np.random.default_rng(0)
    for number in range(times):
        store = tmp_path / f"store{number}"
        command = [sys.executable, script, store, *paths]
        process = subprocess.Popen(command, env=ENV, start_new_session=True, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 120
        while not list(store.glob("shards/*.tmp/*")) and time.monotonic() < deadline and process.poll() is None:
            time.sleep(0.005)
        time.sleep(float(random.uniform(0, 0.3)))
        strike(process, victim)
        process.wait(timeout=300)
        assert subprocess.run(command, env=ENV, check=False, timeout=300).returncode == 0 or tree(store) == expected
        assert tree(store) == expected
        assert len(CellStore.open(store)) == 1200


def strike(process: subprocess.Popen, victim: str) -> None:
    workers = [
        child for child in psutil.Process(process.pid).children() if "resource_tracker" not in " ".join(child.cmdline())
    ]
    if victim == "the parent":
        process.kill()
    elif victim == "all":
        os.killpg(process.pid, signal.SIGKILL)
    elif workers:
        workers[0].kill()
