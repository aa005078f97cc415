# SPDX-License-Identifier: Apache-2.0
"""A command's worker processes and ranks as forks of what has imported everything, where it would start interpreters.

Starting one takes seconds of imports; hundreds of tries cannot pay for that. What a process does from its first line of
ours on, its environment, session, parent and pipes are the same.
"""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

from tries import end_with


def fork_workers() -> None:
    """Fork the processes of `multiprocessing` in this process, which has one thread, instead of spawning them."""
    forked = multiprocessing.get_context("fork")
    multiprocessing.get_context = lambda method=None: forked


def fork_ranks(ranks: int, main: Callable[[list[str]], int]) -> None:
    """Let torch's elastic agent start its ranks out of processes that are forked here, before any thread is there."""
    from torch.distributed.elastic.multiprocessing.subprocess_handler import subprocess_handler

    sleeping: list[_Rank] = []
    for _ in range(ranks):
        sleeping.append(_Rank(main, sleeping))

    def start(_handler: object, words: tuple[str, ...], environment: dict[str, str]) -> "_Rank":
        rank = sleeping.pop()
        rank.wake(words, environment)
        return rank

    subprocess_handler.SubprocessHandler._popen = start


class _Rank:
    """A forked process that waits to become a rank; what the agent asks of a `Popen`."""

    def __init__(self, main: Callable[[list[str]], int], others: list["_Rank"]):
        reading, self._writing = os.pipe()
        self.returncode: int | None = None
        self.pid = os.fork()
        if self.pid == 0:
            for descriptor in [self._writing, *(other._writing for other in others)]:
                os.close(descriptor)
            end_with(lambda: _sleep(reading, main))
        os.close(reading)

    def wake(self, words: tuple[str, ...], environment: dict[str, str]) -> None:
        """Go on as `words`, which begin with an interpreter, -m and the module."""
        with os.fdopen(self._writing, "w") as pipe:
            json.dump([words[3:], environment], pipe)

    def poll(self) -> int | None:
        """Return the exit code, None while it runs."""
        if self.returncode is None:
            done, status = os.waitpid(self.pid, os.WNOHANG)
            if done:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Return the exit code when it has ended."""
        end = time.monotonic() + (timeout if timeout is not None else float("inf"))
        while (code := self.poll()) is None:
            if time.monotonic() > end:
                raise subprocess.TimeoutExpired("a rank", timeout or 0.0)
            time.sleep(0.02)
        return code

    def send_signal(self, number: int) -> None:
        """Send a signal if it runs."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """End it."""
        self.send_signal(signal.SIGKILL)


def _sleep(reading: int, main: Callable[[list[str]], int]) -> int:
    """Wait to be woken, then be the rank; 0 where who would wake it has ended."""
    with os.fdopen(reading) as pipe:
        text = pipe.read()
    if not text:
        return 0
    order: tuple[list[str], dict[str, Any]] = json.loads(text)
    words, environment = order
    os.setsid()
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = ["megacell", *words]
    signal.signal(signal.SIGINT, signal.default_int_handler)
    return main(words)
