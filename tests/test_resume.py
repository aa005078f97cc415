# SPDX-License-Identifier: Apache-2.0
"""A run that was killed, stopped or damaged goes on from its last whole checkpoint as if nothing had happened."""

import io
import json
import os
import pickle
import random
import resource
import shutil
import signal
import time

import pytest
import torch
import xxhash
from runs import TINY, Command, checkpoints, differing, everything_in, figures, fine, here, last_step, one_line, tensors
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, MetadataIndex

from megacell.training.checkpoint import checkpoint

STEPS, EVERY = 80, 20
KILLS = 30


@pytest.fixture(scope="module")
def settings(store, vocabulary) -> list[str]:
    """Two data parallel ranks with both dropouts: any random state that is not a function of the step would show.

    On a CPU `deterministic=true` changes nothing; that it is taken along by a run that goes on is seen here.
    """
    dropout = ("model.hidden_dropout=0.1", "model.attention_dropout=0.1", "deterministic=true")
    sizes = ("model.layers=1", "batch.cells=16", "validation.cells=8", f"steps={STEPS}", "devices=2")
    every = (f"checkpoint.every={EVERY}", f"validation.every={EVERY}", "checkpoint.keep=3")
    return [f"store={store}", f"vocabulary={vocabulary}", *TINY, *dropout, *sizes, *every]


@pytest.fixture(scope="module")
def whole(settings, made):
    """The run that nobody touches."""
    run = made / "whole"
    assert "; deterministic" in fine("pretrain", *settings, f"out={run}")
    return run


def wait_until(command: Command, run, step: int) -> None:
    """Return when the run has logged a step."""
    while last_step(run) < step:
        assert command.process.poll() is None, f"ended by itself at step {last_step(run)}\n{command.end()}"
        time.sleep(0.02)


def kill(command: Command) -> list[int]:
    """Kill a command's process group without warning; return what of its family still lives seconds later."""
    os.killpg(command.process.pid, signal.SIGKILL)
    command.process.wait()
    for _ in range(200):
        if not (left := command.family()):
            break
        time.sleep(0.05)
    return left


@pytest.fixture(scope="module")
def killed(settings, made):
    """The same run, killed without warning between two checkpoints; and whether a process of it was left behind."""
    run = made / "killed"
    command = Command("pretrain", *settings, f"out={run}")
    wait_until(command, run, 2 * EVERY + 3)
    return run, command.family(), kill(command)


@pytest.fixture(scope="module")
def stopped(killed, made):
    """A copy of the killed run, resumed and stopped by SIGTERM; and the exit code, stdout and stderr."""
    run = made / "stopped"
    shutil.copytree(killed[0], run)
    seen = last_step(run)
    command = Command("pretrain", f"out={run}", "resume=true")
    wait_until(command, run, seen + 5)
    os.kill(command.process.pid, signal.SIGTERM)
    return run, command.end(), command.family()


def assert_the_same(run, whole) -> None:
    """Assert that two finished runs logged the same figures and ended with the same tensors, bit for bit."""
    ours, theirs = figures(run), figures(whole)
    assert [row["step"] for row in ours] == [str(step) for step in range(1, STEPS + 1)]
    assert ours == theirs
    assert json.loads((run / "summary.json").read_text()) == json.loads((whole / "summary.json").read_text())
    last = f"checkpoints/step-{STEPS:08d}"
    one, other = tensors(run / last), tensors(whole / last)
    assert any(name.startswith("optimizer.state.exp_avg_sq") for name in one)
    assert not differing(one, other)


def test_a_killed_run_leaves_no_process_behind(killed):
    run, born, left = killed
    assert len(born) >= 3, "the command and its two ranks"
    assert not left
    assert EVERY < last_step(run) < STEPS


def test_a_run_killed_while_it_starts_leaves_no_process_behind(settings, tmp_path):
    command = Command("pretrain", *settings, f"out={tmp_path / 'run'}")
    while len(command.family()) < 3:  # its ranks have only just been born
        assert command.process.poll() is None
        time.sleep(0.02)
    left = kill(command)
    for process in left:
        os.kill(process, signal.SIGKILL)
    assert not left


def test_what_a_killed_run_has_saved_is_whole(killed):
    folder = killed[0] / "checkpoints"
    newest, passed_over = checkpoint.newest(folder)
    assert not passed_over
    assert newest is not None
    assert int(newest.name[-8:]) >= 2 * EVERY


def test_a_killed_run_goes_on_as_if_never_killed(killed, whole, made):
    run = made / "resumed"
    shutil.copytree(killed[0], run)
    newest = checkpoints(run)[-1]
    printed = fine("pretrain", f"out={run}", "resume=true")
    assert f"resuming at step {newest} " in printed
    assert "; deterministic" in printed
    assert "passed over" not in printed
    assert_the_same(run, whole)


@pytest.mark.exhaustive
def test_a_run_that_is_killed_thirty_times_ends_as_if_never_killed(settings, whole, made):
    """Every other kill falls into a save; the moments are drawn. Each goes on from what the one before left."""
    run, draw, in_saves = made / "often", random.Random(0), 0
    words = [*settings, f"out={run}", "checkpoint.every=2"]
    for kill_number in range(KILLS):
        command = Command("pretrain", *words)
        wait_until(command, run, min(last_step(run) + draw.randint(1, 3), STEPS - 10))
        deadline = time.monotonic() + 20
        while kill_number % 2 and not partial(run) and time.monotonic() < deadline:
            time.sleep(0.001)
        time.sleep(draw.uniform(0, 0.05))
        in_saves += partial(run)
        assert not kill(command)
        words = [f"out={run}", "resume=true"]
        if checkpoints(run) and checkpoints(run)[-1] > STEPS - 20:  # near the end: from an earlier checkpoint again
            shutil.rmtree(run / "checkpoints")
    assert in_saves >= KILLS // 6
    fine("pretrain", *words)
    assert_the_same(run, whole)


def partial(run) -> bool:
    """Return whether a checkpoint is being written."""
    return any((run / "checkpoints").glob(".step-*.partial"))


def test_sigterm_saves_the_step_and_ends_with_75(stopped, killed):
    run, (code, out, err), left = stopped
    assert code == 75, err
    assert not left
    step = last_step(run)
    assert last_step(killed[0]) < step < STEPS
    assert checkpoints(run)[-1] == step
    assert json.loads((run / "summary.json").read_text())["finished"] is False
    assert f"step {step}" in out.splitlines()[-1]
    assert "resume=true" in out.splitlines()[-1]
    assert "Traceback" not in err


def test_a_damaged_checkpoint_is_passed_over_for_the_one_before_and_nothing_changes(stopped, whole, made):
    run = made / "damaged"
    shutil.copytree(stopped[0], run)
    *_, before, newest = checkpoints(run)
    damaged = run / "checkpoints" / f"step-{newest:08d}" / "__0_1.distcp"
    content = bytearray(damaged.read_bytes())
    content[len(content) // 2] ^= 1
    damaged.write_bytes(content)
    printed = fine("pretrain", f"out={run}", "resume=true")
    (line,) = [line for line in printed.splitlines() if "passed over" in line]
    assert str(damaged) in line
    assert f"resuming at step {before} " in printed
    assert_the_same(run, whole)


def test_a_full_disk_keeps_the_checkpoints_and_is_one_line(stopped, made):
    run = made / "full"
    shutil.copytree(stopped[0], run)
    before = everything_in(run / "checkpoints")
    limit = 300_000  # bytes of any one file: under a rank's part of a checkpoint, over all else that a run writes
    assert max(map(len, before.values())) > 2 * limit
    command = Command(
        "pretrain", f"out={run}", "resume=true",
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )  # fmt: skip
    code, _, err = command.end()
    assert code == 1
    next_one = (checkpoints(run)[-1] // EVERY + 1) * EVERY
    one_line(err, f"checkpoints/step-{next_one:08d}", "could not be written", "make room")
    assert everything_in(run / "checkpoints") == before
    assert not command.family()


# pickles


class Runs:
    """What a pickle can do: on reading, it makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def sign(folder) -> None:
    """Write sizes and hashes into checkpoint.json anew, as whoever changed a file would."""
    marker = folder / checkpoint.MARKER
    facts = json.loads(marker.read_text())
    for name in facts["files"]:
        content = (folder / name).read_bytes()
        facts["files"][name] = [len(content), xxhash.xxh3_64_hexdigest(content)]
    marker.write_text(json.dumps(facts))


@pytest.fixture
def foreign(copies, tmp_path):
    """A copy of a run's newest checkpoint in a run of its own, and the folder that a pickle in it would make."""
    run = tmp_path / "foreign"
    folder = run / "checkpoints" / f"step-{checkpoints(copies[0])[-1]:08d}"
    shutil.copytree(copies[0] / "checkpoints" / folder.name, folder)
    shutil.copytree(copies[0] / "vocabulary", run / "vocabulary")
    return run, folder, tmp_path / "was-run"


def spoil_metadata(folder, trace) -> str:
    """Torch reads it through an open unpickler."""
    (folder / ".metadata").write_bytes(pickle.dumps(Runs(trace)))
    return "posix.mkdir"


def spoil_common(folder, trace) -> str:
    """Megatron's own file."""
    torch.save({"args": Runs(trace)}, folder / "common.pt")
    return "posix.mkdir"


def spoil_bytes(folder, trace) -> str:
    """A bytes entry, of its own or in place of a tensor: torch reads its bytes through an open unpickler."""
    metadata = pickle.loads((folder / ".metadata").read_bytes())  # of a run that this test has made
    entries = metadata.state_dict_metadata
    name = next((n for n, entry in entries.items() if isinstance(entry, BytesStorageMetadata)), "lm_head.dense.bias")
    metadata.state_dict_metadata[name] = BytesStorageMetadata()
    payload = io.BytesIO()
    torch.save(Runs(trace), payload)
    (index,) = [index for index in metadata.storage_data if index.fqn == name]
    stored = metadata.storage_data.pop(index)
    with open(folder / stored.relative_path, "ab") as file:
        stored.offset, stored.length = file.tell(), file.write(payload.getvalue())
    metadata.storage_data[MetadataIndex(name)] = stored
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    return "BytesStorageMetadata"


@pytest.mark.parametrize(
    ("spoil", "file"),
    [(spoil_metadata, ".metadata"), (spoil_common, "common.pt"), (spoil_bytes, ".metadata")],
    ids=["in torch's metadata", "in Megatron's common.pt", "in the bytes of an entry"],
)
def test_a_foreign_pickle_in_a_checkpoint_is_refused_by_name_and_not_run(spoil, file, foreign, tmp_path):
    run, folder, trace = foreign
    name = spoil(folder, trace)
    sign(folder)
    code, _, err = here("export", run, "--to", "nemo", "--out", tmp_path / "out.nemo")
    assert not trace.exists(), "it was run"
    assert code == 1
    one_line(err, str(folder / file), name, "refused")
    assert not (tmp_path / "out.nemo").exists()


def test_the_pickle_of_the_test_does_what_it_says(tmp_path):
    pickle.loads(pickle.dumps(Runs(tmp_path / "was-run")))  # it is to run: it makes a folder
    assert (tmp_path / "was-run").exists()
