# SPDX-License-Identifier: Apache-2.0
"""Run folders that somebody made, or that two processes want at once: nothing in them is run, resolved or lost."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import models_made as made
import pytest
from runs import TINY, Command, fine, here, metrics, one_line

from megacell.core import lock
from megacell.core.errors import DataError, UsageError
from megacell.core.files import write_whole
from megacell.training.config import settings

HOLDER = """
import sys, time
from pathlib import Path
from megacell.core import lock
with lock.held(Path(sys.argv[1]), "busy"):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def holder():
    """Start processes that hold a lock until the test ends."""
    started = []

    def start(path: Path) -> subprocess.Popen:
        paths = os.pathsep.join(path for path in sys.path if path)
        environment = {**os.environ, "PYTHONPATH": paths}
        command = [sys.executable, "-c", HOLDER, path]
        process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
        started.append(process)
        assert process.stdout.readline() == "held\n"
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()
        process.stdout.close()


@pytest.fixture
def run(tmp_path) -> Path:
    """A run of an earlier version, its paths made right."""
    return made.copy_run(tmp_path)


def left(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if lock.NAME in path.name)


# -- the lock


def test_a_lock_names_its_holder_and_is_free_when_that_ends(tmp_path, holder):
    path = tmp_path / ".lock"
    process = holder(path)
    assert lock.is_held(path)
    with pytest.raises(DataError) as error, lock.held(path, "the thing: is being made"):
        pass
    one_line(
        str(error.value), "the thing: is being made (process", f"process {process.pid} on ", "or delete", str(path)
    )
    process.kill()  # and nobody waits for it: a zombie holds nothing
    while lock.is_held(path):
        time.sleep(0.01)
    with lock.held(path, ""):
        assert left(tmp_path) == [".lock"]
    assert left(tmp_path) == []


def test_what_killed_processes_left_on_their_way_is_taken_away(tmp_path):
    names = (f".lock-{'0' * 16}", f".lock-{'a' * 16}.claim", f".lock-{'a' * 16}.claim-{'b' * 16}")
    for name in (*names, ".lock-part-0-of-2", "x.lock"):
        (tmp_path / name).write_text("{}")
    with lock.held(tmp_path / ".lock", ""):
        pass
    assert left(tmp_path) == [".lock-part-0-of-2", "x.lock"]


@pytest.mark.parametrize(
    ("theirs", "ours", "taken"),
    [
        ({"job": "c 7", "turn": 0}, {"SLURM_JOB_ID": "7", "SLURM_CLUSTER_NAME": "c", "SLURM_RESTART_COUNT": "1"}, True),
        (
            {"job": "c 7", "turn": 1},
            {"SLURM_JOB_ID": "7", "SLURM_CLUSTER_NAME": "c", "SLURM_RESTART_COUNT": "1"},
            False,
        ),
        (
            {"job": "d 7", "turn": 0},
            {"SLURM_JOB_ID": "7", "SLURM_CLUSTER_NAME": "c", "SLURM_RESTART_COUNT": "1"},
            False,
        ),
        ({"job": "7", "turn": 0}, {"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": "2"}, True),
        ({"job": "8", "turn": 0}, {"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": "2"}, False),
        ({"job": "7", "turn": 0}, {}, False),
        ({}, {"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": "2"}, False),
    ],
)
def test_a_job_that_slurm_has_queued_again_takes_over_from_another_machine(theirs, ours, taken, tmp_path, monkeypatch):
    for name in ("SLURM_JOB_ID", "SLURM_CLUSTER_NAME", "SLURM_RESTART_COUNT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in ours.items():
        monkeypatch.setenv(name, value)
    content = {"where": "another machine", "pid": 1, "started": "1", "token": "ab" * 8, **theirs}
    (tmp_path / ".lock").write_text(json.dumps(content))
    refused = contextlib.nullcontext() if taken else pytest.raises(DataError, match="process 1 on another")
    with refused, lock.held(tmp_path / ".lock", "busy"):
        pass


@pytest.mark.parametrize(
    "content",
    ["", "scribble", "[1]", "{}", '{"where": "here", "pid": "1", "started": "", "token": "../../x"}', "[" * 100_000,
     '{"pid": 1e999, "where": "", "started": 1, "token": "a"}'],
)  # fmt: skip
def test_a_lock_that_is_none_is_respected_and_leads_nowhere(content, tmp_path):
    (tmp_path / ".lock").write_text(content)
    with pytest.raises(DataError) as error, lock.held(tmp_path / ".lock", "busy"):
        pass
    assert len(str(error.value).splitlines()) == 1
    assert left(tmp_path) == [".lock"]


def test_a_token_that_is_a_path_leads_nowhere(tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    dead = {"where": lock._where(), "pid": 2**22 + 1, "started": "1", "token": "/../../x"}
    (folder / ".lock").write_text(json.dumps(dead))
    with pytest.raises(DataError, match="not a lock of ours"), lock.held(folder / ".lock", "busy"):
        pass
    assert [path.name for path in tmp_path.rglob("*")] == ["folder", ".lock"]


def test_a_lock_that_is_a_pipe_or_a_link_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.lock")
    (tmp_path / "link.lock").symlink_to("/dev/zero")
    for name in ("pipe.lock", "link.lock"):
        with pytest.raises(DataError, match="not a lock of ours"), lock.held(tmp_path / name, "busy"):
            pass


# -- one writer


def test_a_run_that_another_process_trains_is_refused(run, holder, tmp_path):
    process = holder(run / lock.NAME)
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    code, _, error = here("pretrain", f"out={run}", "resume=true", "steps=6")
    assert code == 1
    one_line(error, str(run), "another process is training in this folder", f"process {process.pid}")
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
    code, _, error = here("pretrain", f"store={made.STORE}", f"vocabulary={run}/vocabulary", f"out={run}")
    assert code == 2
    one_line(error, "exists: add resume=true")


def test_of_a_start_that_was_killed_nothing_but_a_lock_is_left(tmp_path, holder):
    """And that is no run folder: the same command starts again; refused by its settings, it leaves no folder."""
    out = tmp_path / "out"
    out.mkdir()
    process = holder(out / lock.NAME)
    given = (f"store={made.STORE}", f"vocabulary={made.RUN}/vocabulary", f"out={out}", "data.where=no_such_column == 1")
    code, _, error = here("pretrain", *given)
    assert code == 1
    one_line(error, "another process is training")
    process.kill()
    while lock.is_held(out / lock.NAME):
        time.sleep(0.01)
    code, _, error = here("pretrain", *given)
    assert code == 2
    one_line(error, "no_such_column")
    assert list(out.iterdir()) == []
    out.rmdir()
    here("pretrain", *given)
    assert not out.exists()


def test_two_at_once_in_one_folder_are_one_run(tmp_path):
    """A second process is refused while one trains; killed, the run goes on to its end, with all of its rows."""
    out = tmp_path / "run"
    given = (
        f"store={made.STORE}", f"vocabulary={made.RUN}/vocabulary", f"out={out}", *TINY, "checkpoint.every=2",
        "data.split.by=cell", "data.split.holdout=0.2",
    )  # fmt: skip
    first = Command("pretrain", *given, "steps=100000")
    try:
        while not list(out.glob("checkpoints/step-*")):
            assert first.process.poll() is None, first.end()
            time.sleep(0.1)
        code, _, error = Command("pretrain", f"out={out}", "resume=true").end()
        assert code == 1
        one_line(error, "another process is training in this folder", str(first.process.pid))
    finally:
        os.killpg(first.process.pid, signal.SIGKILL)
        first.process.communicate()
    steps = int(sorted(path.name for path in (out / "checkpoints").glob("step-*"))[-1][-8:]) + 4
    fine("pretrain", f"out={out}", "resume=true", f"steps={steps}")
    assert [int(row["step"]) for row in metrics(out)] == list(range(1, steps + 1))
    assert left(out) == []


def test_an_output_that_another_process_writes_is_refused(tmp_path, holder):
    from megacell.geneformer import embed_file

    for command, name in (("tokenize", "corpus"), ("embed", "e.npy")):
        out = tmp_path / name
        process = holder(lock.beside(out))
        words = ("--vocabulary", made.RUN / "vocabulary", "--allow-low-coverage")
        given = [command, made.STORE, *words] if command == "tokenize" else [command, made.MODEL, made.STORE]
        code, _, error = here(*given, "--out", out)
        assert code == 1
        one_line(error, f"{out}: another process is writing it", f"process {process.pid}")
        assert not out.exists()
        process.kill()
        while lock.is_held(lock.beside(out)):
            time.sleep(0.01)
    embed_file(made.MODEL, made.STORE, tmp_path / "e.npy")
    assert sorted(path.name for path in tmp_path.iterdir()) == [".corpus.lock", "e.npy"]


def test_a_rank_that_is_not_the_first_takes_no_lock(run, monkeypatch):
    from megacell.training.run.pretrain import only_one

    cfg = settings.compose([f"out={run}", "resume=true"])
    with lock.held(run / lock.NAME, ""):
        monkeypatch.setenv("RANK", "1")
        with only_one(cfg):
            pass
        monkeypatch.setenv("RANK", "0")
        with pytest.raises(DataError, match="another process"), only_one(cfg):
            pass


# -- what its files say


MARK = "source == '\"' or @pd.io.common.os.system('touch {}') == 0"
OPTIONS = {  # what: a change of config.yaml, and words of the refusal
    "a variable of the environment": (lambda c: c.update(init="${oc.env:SECRET_TOKEN}"), "is never resolved"),
    "one in a query": (lambda c: c["data"].update(where="x == '${oc.env:SECRET_TOKEN}'"), "is never resolved"),
    "one in a name": (lambda c: c.update({"${oc.env:SECRET_TOKEN}": 1}), "is never resolved"),
    "a query that is a number": (lambda c: c["data"].update(where=5), "data.where: must be a text, or null"),
    "a query that is a list": (lambda c: c["data"].update(where=["a"]), "data.where: must be a text, or null"),
    "a column that is a mapping": (lambda c: c["data"].update(balance={"a": 1}), "data.balance"),
    "a split by a list": (lambda c: c["data"]["split"].update(by=[1]), "data.split.by"),
    "an option that there is not": (lambda c: c.update(more=1), "more"),
    "a thousand million layers": (lambda c: c["model"].update(layers=10**9), "from 1 to 1,000"),
    "a network that is not its checkpoint's": (lambda c: c["model"].update(layers=3), "the layers of config.yaml"),
    "a logger's folder": (
        lambda c: c["logger"].update(wandb={"project": "p", "save_dir": "/tmp/megacell-wandb"}),
        "logger.wandb.save_dir: no option here",
    ),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_options_of_a_run_are_refused_in_one_line(name, run, monkeypatch):
    change, words = OPTIONS[name]
    made.change_config(run, change)
    monkeypatch.setenv("SECRET_TOKEN", made.SECRET)
    code, out, error = here("pretrain", f"out={run}", "resume=true")
    assert code in (1, 2)
    one_line(error, words)
    assert made.SECRET not in out + error
    assert not any(made.SECRET.encode() in path.read_bytes() for path in run.rglob("*") if path.is_file())
    assert left(run) == []


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"a: &a [1]\nb: *a\n", "anchors or aliases"),
        (b"a: 1\n" + b"#" * (2 << 20), "1,048,576 at most"),
        (b"- 1", "holds no options"),
        (b"a: !!python/object/apply:os.system ['touch /tmp/megacell-was-here']", "no YAML"),
        (b"\xff\xfe\x00", "not the options of a run"),
    ],
    ids=["anchors", "2 MB", "a list", "Python objects", "no text"],
)
@pytest.mark.parametrize("command", ["pretrain", "report"])
def test_a_config_that_is_none_is_refused(content, words, command, run):
    (run / "config.yaml").write_bytes(content)
    given = ("pretrain", f"out={run}", "resume=true") if command == "pretrain" else ("report", run)
    code, _, error = here(*given)
    assert code == 1
    one_line(error, "config.yaml", words)
    assert not Path("/tmp/megacell-was-here").exists()


def test_a_query_of_a_run_runs_nothing(run, tmp_path):
    mark = tmp_path / "mark"
    made.change_config(run, lambda c: c["data"].update(where=MARK.format(mark)))
    code, _, error = here("pretrain", f"out={run}", "resume=true", "steps=6")
    assert code == 2
    one_line(error, "the query", "fails")
    assert not mark.exists()


def test_how_processes_are_started_is_not_for_a_run_to_say(run):
    made.change_config(run, lambda c: c.update(launcher={"kind": "srun", "setup": "touch /tmp/x", "submit": True}))
    assert settings.compose([f"out={run}", "resume=true"]).launcher == {"kind": "local"}
    cfg = settings.compose([f"out={run}", "resume=true", "launcher=srun", "launcher.submit=false"])
    assert cfg.launcher.setup == ""


def test_what_is_written_for_a_run_has_nothing_to_resolve(run, monkeypatch):
    monkeypatch.setenv("SECRET_TOKEN", "a/b")
    given = [f"store={made.STORE}", f"vocabulary={run}/vocabulary", f"out={run}/new"]
    cfg = settings.compose([*given, "init=${oc.env:SECRET_TOKEN}"])  # the command line is its user's own
    assert cfg.init == "a/b"
    with pytest.raises(UsageError, match="is never resolved"):
        settings.compose([*given, "init='\\${oc.env:SECRET_TOKEN}'"])


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("metrics.csv", "step,loss\nmany,1\n"),
        ("metrics.csv", "loss\n1\n"),
        ("metrics.csv", "step,loss\n1" + "0" * 200_000 + ",1\n"),
        ("metrics.csv", "step,more\n1,2\n"),
        ("skipped.csv", "step,reason\nx,y\n"),
    ],
)
def test_tables_of_a_run_that_are_none_are_refused_by_name(name, content, tmp_path):
    from megacell.training.run.guard import SkippedFile
    from megacell.training.run.metrics import MetricsFile

    path = tmp_path / name
    path.write_text(content)
    with pytest.raises(DataError, match=f"{name}: holds what a run does not write there"):
        (MetricsFile if name == "metrics.csv" else SkippedFile)(path, 3)
    assert path.read_text() == content


def test_rows_past_the_step_are_dropped_and_those_before_are_never_gone(tmp_path, monkeypatch):
    from megacell.training.run import csv_file

    path = tmp_path / "metrics.csv"
    path.write_text("step,loss\n1,2.5\n2,2.25\n3,2.0\n")

    def stopped(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(csv_file, "write_whole", stopped)
    with pytest.raises(KeyboardInterrupt):
        csv_file.keep_rows(path, ("step", "loss"), 2)
    assert path.read_text() == "step,loss\n1,2.5\n2,2.25\n3,2.0\n"
    monkeypatch.setattr(csv_file, "write_whole", write_whole)
    csv_file.keep_rows(path, ("step", "loss"), 2)
    assert path.read_text().splitlines() == ["step,loss", "1,2.5", "2,2.25"]
