# SPDX-License-Identifier: Apache-2.0
"""A rank that dies or fails ends the whole run within a minute, with the reason, and leaves no process behind."""

import os
import resource
import signal
import time

import pytest
from runs import TINY, Command, checkpoints, last_step

from ranks import free_port

MOST = 60  # seconds from the death of a rank to the end of the run
ENDLESS = ("steps=100000", "validation.every=100000", "validation.cells=8", "model.layers=1", "checkpoint.every=20")


@pytest.fixture
def running(store, vocabulary, tmp_path):
    """A function that starts a run of two ranks and returns its commands and folder once it trains."""
    started: list[Command] = []
    run = tmp_path / "run"

    def go(*each: list[str]) -> tuple[list[Command], object]:
        words = [f"store={store}", f"vocabulary={vocabulary}", f"out={run}", *TINY, *ENDLESS]
        started.extend(Command("pretrain", *words, *more) for more in each)
        while last_step(run) < 3:
            assert all(command.process.poll() is None for command in started), started[0].end()
            time.sleep(0.05)
        return started, run

    yield go
    for command in started:
        for process in command.family():
            os.kill(process, signal.SIGKILL)


def rank_of(commands: list[Command], rank: int) -> int:
    """Return the process of a rank."""
    for command in commands:
        for process in command.family():
            with open(f"/proc/{process}/environ", "rb") as file:
                if f"RANK={rank}".encode() in file.read().split(b"\0"):
                    return process
    raise AssertionError(f"no rank {rank}")


def ends(commands: list[Command]) -> list[tuple[int, str]]:
    """Wait a minute at most; return each command's exit code and stderr."""
    deadline = time.monotonic() + MOST
    while any(command.process.poll() is None for command in commands):
        assert time.monotonic() < deadline, "still running"
        time.sleep(0.1)
    assert not any(command.family() for command in commands)
    return [(code, err) for code, _, err in (command.end() for command in commands)]


@pytest.mark.parametrize("rank", [pytest.param(0, marks=pytest.mark.exhaustive), 1])
def test_a_killed_rank_ends_the_run(rank, running):
    commands, _ = running(["devices=2"])
    os.kill(rank_of(commands, rank), signal.SIGKILL)
    ((code, err),) = ends(commands)
    assert code == 1
    assert "a rank was ended by SIGKILL" in err


def test_a_rank_that_cannot_write_its_part_of_a_checkpoint_ends_the_run(running):
    commands, run = running(["devices=2", "parallel.tensor=2"])
    resource.prlimit(rank_of(commands, 1), resource.RLIMIT_FSIZE, (1000, 1000))
    ((code, err),) = ends(commands)
    assert code == 1
    assert "could not be written" in err
    assert all(step % 20 == 0 for step in checkpoints(run))


@pytest.mark.exhaustive
def test_a_killed_rank_on_one_of_two_machines_ends_the_run_on_both(running):
    meeting = ["launcher=torchrun", "launcher.nodes=2", f"launcher.endpoint=127.0.0.1:{free_port()}"]
    commands, _ = running(*[[*meeting, "launcher.address=127.0.0.1"]] * 2)
    os.kill(rank_of(commands, 1), signal.SIGKILL)
    ended = ends(commands)
    assert all(code for code, _ in ended)
    assert any("a rank was ended by SIGKILL" in err for _, err in ended)
