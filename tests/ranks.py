# SPDX-License-Identifier: Apache-2.0
"""A pool of gloo ranks for the tests of a file: importing Megatron and NeMo takes 10 s, so it is done once."""

import multiprocessing
import os
import socket
import traceback
from collections.abc import Callable
from typing import Any

WAIT = 300  # seconds for an answer; a rank that hangs fails the test


def free_port() -> int:
    """Return a port that nobody listens on."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def _serve(rank: int, world: int, port: int, pipe) -> None:
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), GROUP_RANK="0", WORLD_SIZE=str(world), LOCAL_WORLD_SIZE=str(world),
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), TORCHELASTIC_RUN_ID="tests", OMP_NUM_THREADS="1",
    )  # fmt: skip
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    while (order := pipe.recv()) is not None:
        job, args, options = order
        try:
            pipe.send((True, job(*args, **options)))
        except BaseException:  # the test shows it, whatever it is
            pipe.send((False, traceback.format_exc()))
    dist.destroy_process_group()


class Ranks:
    """``world`` processes; ``run`` calls a module-level function in each and returns their results."""

    def __init__(self, world: int):
        context, port = multiprocessing.get_context("spawn"), free_port()
        self.pipes, self.processes = [], []
        for rank in range(world):
            mine, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, world, port, theirs), daemon=False)
            process.start()
            self.pipes.append(mine)
            self.processes.append(process)

    def run(self, job: Callable, *args: Any, **options: Any) -> list[Any]:
        """Return ``job(*args, **options)`` of every rank; AssertionError with the traceback of the one that failed."""
        for pipe in self.pipes:
            pipe.send((job, args, options))
        answers = []
        for rank, pipe in enumerate(self.pipes):
            assert pipe.poll(WAIT), f"rank {rank} gave no answer within {WAIT} s"
            answers.append(pipe.recv())
        for rank, (fine, answer) in enumerate(answers):
            assert fine, f"rank {rank}:\n{answer}"
        return [answer for _, answer in answers]

    def close(self) -> None:
        """End the processes."""
        for pipe, process in zip(self.pipes, self.processes, strict=True):
            if process.is_alive():
                pipe.send(None)
            process.join(20)
            if process.is_alive():
                process.kill()
