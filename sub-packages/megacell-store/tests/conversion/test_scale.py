# SPDX-License-Identifier: Apache-2.0
"""Many files, many processes, many machines: what was done is kept, and what is bad stops nothing else."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from megacell.core.errors import DataError, UsageError
from megacell.core.progress import Progress
from megacell.store import CellStore, convert
from megacell.store.conversion import conversion
from megacell.store.conversion.plan import load_plan
from megacell.store.format.manifest import Manifest
from megacell.store.format.verify import verify
from megacell.store.processes.executors import fitting_workers, parse_bytes

ALLOWED = {"allow_subset": True, "shard_bytes": 20_000}
ENV = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}


@pytest.fixture
def files(made, save) -> list[Path]:
    """Four files of 60 cells whose genes differ; at `shard_bytes` above, several shards."""
    return [save(made.counts(60, 300, seed=i), f"f{i}.h5ad", first_gene=50 * i) for i in range(4)]


@pytest.fixture
def whole(files, tmp_path) -> Manifest:
    """What one undisturbed process makes of the files."""
    convert(files, tmp_path / "whole", **ALLOWED)
    return Manifest.open(tmp_path / "whole")


def left(store: Path) -> list[str]:
    return sorted(path.relative_to(store).as_posix() for path in store.rglob("*"))


def test_after_a_kill_only_unfinished_shards_are_made_again(files, whole, tmp_path, monkeypatch):
    store = tmp_path / "store"
    real, made, most = conversion.attempt, tmp_path / "made", 3

    def dying(place, number):  # in a process of its own, so what it did is told by a file
        done = made.read_text().split() if made.exists() else []
        if len(done) == most:
            raise KeyboardInterrupt
        made.write_text(" ".join([*done, str(number)]))
        return real(place, number)

    monkeypatch.setattr(conversion, "attempt", dying)
    with pytest.raises(KeyboardInterrupt):
        convert(files, store, **ALLOWED)
    assert not (store / "manifest.json").exists()
    lines, most = [], 1000
    convert(files, store, log=lines.append, **ALLOWED)
    assert sorted(map(int, made.read_text().split())) == list(range(len(whole.shards)))
    assert any(f"3 of {len(whole.shards)} shards are there" in line for line in lines)
    assert Manifest.open(store).digest == whole.digest
    assert left(store) == left(tmp_path / "whole")


@pytest.mark.parametrize("change", ["a file", "an option"])
def test_another_request_starts_anew(change, files, tmp_path, monkeypatch):
    store = tmp_path / "store"
    monkeypatch.setattr(conversion, "publish", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        convert(files, store, **ALLOWED)
    monkeypatch.undo()
    if change == "a file":
        os.utime(files[0], (1, 1))
    lines = []
    convert(files, store, min_genes=int(change == "an option"), log=lines.append, **ALLOWED)
    assert not any("going on" in line for line in lines)
    assert len(CellStore.open(store)) == 240


def test_a_shard_that_was_damaged_since_is_made_again(files, whole, tmp_path, monkeypatch):
    store = tmp_path / "store"
    monkeypatch.setattr(conversion, "publish", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        convert(files, store, **ALLOWED)
    monkeypatch.undo()
    (store / "shards/00001/counts.npy").write_bytes(b"short")
    shutil.rmtree(store / "shards/00002")
    convert(files, store, **ALLOWED)
    assert Manifest.open(store).digest == whole.digest
    assert verify(store).damages == []


def test_processes_killed_outright_leave_what_they_finished(made, save, tmp_path):
    """A real SIGKILL of the command and its processes, at whatever moment it strikes."""
    files = [save(made.counts(300, 600, seed=i), f"f{i}.h5ad") for i in range(3)]
    store = tmp_path / "store"
    code = (
        "import sys; from megacell.store import convert\n"
        "if __name__ == '__main__':\n"
        "    convert(sys.argv[2:], sys.argv[1], workers=2, allow_subset=True, shard_bytes=60_000)"
    )
    script = tmp_path / "run.py"
    script.write_text(code)
    command = [sys.executable, script, store, *files]
    process = subprocess.Popen(command, env=ENV, start_new_session=True)
    deadline = time.monotonic() + 60
    while not list(store.glob("plan.tmp/outcome-*.json")) and time.monotonic() < deadline:
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert subprocess.run(command, env=ENV, check=False).returncode == 0
    convert(files, tmp_path / "whole", allow_subset=True, shard_bytes=60_000)
    assert Manifest.open(store).digest == Manifest.open(tmp_path / "whole").digest
    assert left(store) == left(tmp_path / "whole")


@pytest.mark.parametrize("when", ["at the first look", "further on"])
def test_bad_files_do_not_stop_the_others(when, made, files, save, tmp_path, monkeypatch):
    monkeypatch.setattr("megacell.store.sources.choice.SAMPLE_RUNS", 1)
    bad = made.counts(60, 300, seed=9)
    bad[2 if when == "at the first look" else 55, 5] = np.nan
    all_files = [files[0], save(bad, "bad.h5ad"), *files[1:]]
    with pytest.raises(DataError, match=r"bad\.h5ad"):
        convert(all_files, tmp_path / "store", **ALLOWED)
    assert not (tmp_path / "store").exists()
    report = convert(all_files, tmp_path / "store", skip_bad=True, **ALLOWED)
    assert len(report.left_out) == 1
    assert "bad.h5ad" in report.left_out[0]
    store = CellStore.open(tmp_path / "store")
    assert len(store) == 240
    assert [s.cells for s in store.sources] == ([60] * 4 if when == "at the first look" else [60, 0, 60, 60, 60])
    for i in range(4):
        expected = made.counts(60, 300, seed=i)
        ids = [f"ENSG{g:011d}" for g in range(50 * i, 50 * i + 300)]
        np.testing.assert_array_equal(made.all_counts(store, ids)[60 * i : 60 * i + 60], expected)
    assert verify(tmp_path / "store").damages == []


def test_no_good_file_is_an_error(made, save, tmp_path, monkeypatch):
    monkeypatch.setattr("megacell.store.sources.choice.SAMPLE_RUNS", 1)
    early, late = made.counts(60, 300), made.counts(60, 300, seed=1)
    early[0, 0], late[58, 0] = -1, -1
    paths = [save(early, "early.h5ad"), save(late, "late.h5ad")]
    with pytest.raises(DataError, match=r"late\.h5ad"):
        convert(paths, tmp_path / "store", skip_bad=True, **ALLOWED)
    assert not (tmp_path / "store").exists()


def test_parts_of_several_machines_and_a_finish_make_the_same_store(files, whole, tmp_path):
    store = tmp_path / "store"
    for number in (3, 1):
        report = convert(files, store, part=(number, 3), **ALLOWED)
        assert report.generation == 0
        assert not (store / "manifest.json").exists()
    lines = []
    report = convert(files, store, finish=True, log=lines.append, **ALLOWED)  # part 2 never came: it is made now
    assert Manifest.open(store).digest == whole.digest
    assert report.cells == 240
    assert left(store) == left(tmp_path / "whole")


def test_parts_started_at_once_make_one_plan(files, whole, tmp_path):
    store = tmp_path / "store"
    code = (
        "import sys; from megacell.store import convert\n"
        "convert(sys.argv[3:], sys.argv[1], part=(int(sys.argv[2]), 2), allow_subset=True, shard_bytes=20_000)"
    )
    started = [subprocess.Popen([sys.executable, "-c", code, store, str(i), *files], env=ENV) for i in (1, 2)]
    assert [process.wait() for process in started] == [0, 0]
    plan = load_plan(store)
    assert plan is not None
    assert len(list((store / "plan.tmp").glob("outcome-*.json"))) == len(plan.shards)
    convert(files, store, finish=True, **ALLOWED)
    assert Manifest.open(store).digest == whole.digest


def test_nothing_touches_a_plan_whose_parts_are_running(files, tmp_path, monkeypatch):
    store = tmp_path / "store"
    real = conversion.attempt

    def meddled(place, number):
        for request in ({"min_genes": 1}, {"finish": True}):
            with pytest.raises(DataError, match=r"part 1/2 is still running"):
                convert(files, store, **request, **ALLOWED)
        return real(place, number)

    monkeypatch.setattr(conversion, "attempt", meddled)
    convert(files, store, part=(1, 2), **ALLOWED)
    monkeypatch.undo()
    with pytest.raises(UsageError, match="parts go from 1/2 to 2/2"):
        convert(files, store, part=(3, 2), **ALLOWED)
    convert(files, store, finish=True, **ALLOWED)
    assert len(CellStore.open(store)) == 240


def test_a_dask_cluster_makes_the_same_store(files, whole, tmp_path):
    from distributed import LocalCluster

    with LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None, processes=True) as cluster:
        convert(files, tmp_path / "store", scheduler=cluster.scheduler_address, **ALLOWED)
    assert Manifest.open(tmp_path / "store").digest == whole.digest


def test_a_scheduler_that_is_not_there_is_wrong_usage(files, tmp_path, monkeypatch):
    monkeypatch.setattr("distributed.Client", lambda *_, **__: (_ for _ in ()).throw(OSError("refused")))
    with pytest.raises(UsageError, match=r"tcp://127.0.0.1:1: no Dask scheduler answers"):
        convert(files, tmp_path / "store", scheduler="tcp://127.0.0.1:1", **ALLOWED)


def test_a_plan_names_each_list_of_genes_once(made, save, tmp_path, monkeypatch):
    files = [save(made.counts(30, 300, seed=i), f"f{i}.h5ad", first_gene=i % 2) for i in range(6)]
    monkeypatch.setattr(conversion, "publish", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        convert(files, tmp_path / "store", **ALLOWED)
    assert len(list((tmp_path / "store/plan.tmp").glob("????????????????????????????????.parquet"))) == 2
    assert "ENSG" not in (tmp_path / "store/plan.tmp/plan.json").read_text()
    json.loads((tmp_path / "store/plan.tmp/plan.json").read_text())


@pytest.mark.parametrize(
    ("workers", "memory", "expected"), [(4, "4G", 4), (16, "4G", 9), (16, "500M", 1), (1, "400M", 1), (3, "64G", 3)]
)
def test_as_many_processes_as_memory_allows(workers, memory, expected):
    assert fitting_workers(workers, parse_bytes(memory)) == expected


@pytest.mark.parametrize("memory", ["", "much", "-1G", "4X", "100M"])
def test_memory_that_is_none_or_too_little_is_wrong_usage(memory):
    with pytest.raises(UsageError):
        fitting_workers(2, parse_bytes(memory))


def test_a_line_of_progress_says_when_it_ends():
    bar = Progress(show=False)
    bar.start("converting cells", 1000)
    bar.reach(250)
    assert bar.line(60.0) == "converting cells: 250 of 1,000 (25%), 4/s, 3 min left"


def test_a_target_that_cannot_be_written_is_one_line(files, tmp_path):
    """As for a read-only disk; root may write anywhere, so the folder is made where no folder can be."""
    code = (
        "import sys; from megacell.core.cli.main import main\n"
        "sys.exit(main(['convert', sys.argv[1], '--out', '/proc/store', '--allow-subset']))"
    )
    answer = subprocess.run(
        [sys.executable, "-c", code, files[0]], capture_output=True, text=True, env=ENV, check=False
    )
    assert answer.returncode == 1
    assert len(answer.stderr.strip().splitlines()) == 1
    assert "/proc/store" in answer.stderr
