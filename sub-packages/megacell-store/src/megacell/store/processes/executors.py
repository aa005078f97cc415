# SPDX-License-Identifier: Apache-2.0
"""Where tasks run: in processes of this machine, none of which can take the conversion along, or on a Dask cluster.

Reading a damaged file can end a process (HDF5 crashes on some, and never returns from others). So even one worker is
a process of its own where the system can fork; its end is a result like any other.
"""

import multiprocessing
import os
import pickle
import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any, Protocol, TypeVar

from megacell.core.errors import KilledError, UsageError
from megacell.store.processes.watchdog import is_abandoned, make_expendable

Result = TypeVar("Result")
MEMORY = 4 << 30  # bytes of a conversion's processes together
OF_A_WORKER = 400 << 20  # what one process takes at most: Python and its libraries 250 MB, blocks in flight the rest
_UNITS = {"K": 10, "M": 20, "G": 30, "T": 40}


@dataclass(frozen=True)
class Died:
    """In place of a task's result: the signal by which its process ended itself."""

    name: str


class Executor(Protocol):
    """What runs a function over items, results in the items' order."""

    def map(self, function: Callable[..., Result], *items: Iterable[Any]) -> Iterable[Result | Died]:
        """As the built-in map."""


class _InThisProcess:
    def map(self, function: Callable[..., Result], *items: Iterable[Any]) -> Iterable[Result]:
        return map(function, *items)


class _Worker:
    """One process that does one task at a time."""

    def __init__(self, context: Any) -> None:
        self.connection, theirs = multiprocessing.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, self.connection), daemon=True)
        self.process.start()
        theirs.close()

    def died(self) -> Died:
        """Return how the process ended.

        Raises
        ------
        KilledError
            Not by a fault of its own.
        """
        self.process.join()
        code = self.process.exitcode
        if code < 0 and -code not in (signal.SIGKILL, signal.SIGTERM, signal.SIGINT):
            return Died(signal.Signals(-code).name)
        fix = "give fewer --workers and run it again: finished shards are kept"
        raise KilledError(f"a process of the conversion was killed, for want of memory perhaps; {fix}")

    def end(self) -> None:
        self.process.kill()
        self.process.join()
        self.connection.close()


class _Processes:
    def __init__(self, workers: int, context: Any) -> None:
        self._context = context
        self.workers = [_Worker(context) for _ in range(workers)]

    def map(self, function: Callable[..., Result], *items: Iterable[Any]) -> Iterator[Result | Died]:
        tasks = list(zip(*items, strict=True))
        found: dict[int, Result | Died] = {}
        running: dict[Any, tuple[int, int]] = {}  # number of the task, of the worker
        sent = 0
        for number in range(len(tasks)):
            while number not in found:
                busy = {worker for _, worker in running.values()}
                for worker in range(len(self.workers)):
                    if worker not in busy and sent < len(tasks):
                        connection = self.workers[worker].connection
                        with suppress(OSError):  # it died while it waited: receiving tells
                            connection.send((function, tasks[sent]))
                        running[connection] = sent, worker
                        sent += 1
                for each in wait(list(running)):
                    task, worker = running.pop(each)
                    found[task] = self._receive(worker)
            yield found.pop(number)

    def _receive(self, number: int) -> Any:
        """Return the result that a worker sends, or raise what it raised; one that died is replaced."""
        worker = self.workers[number]
        try:
            good, result = worker.connection.recv()
        except (EOFError, OSError):
            died = worker.died()
            worker.end()
            self.workers[number] = _Worker(self._context)
            return died
        if not good:
            raise result
        return result


def _serve(connection: Connection, theirs: Connection) -> None:
    """Do what is asked for, until nobody asks any more."""
    theirs.close()  # else the end of who asks would not be seen
    make_expendable()
    while True:
        try:
            function, task = connection.recv()
        except (EOFError, OSError, KeyboardInterrupt):
            return
        if is_abandoned():
            return
        try:
            answer = True, function(*task)
        except BaseException as error:  # whatever it is, it is raised again by who asked
            answer = False, error
        try:
            connection.send(answer)
        except (OSError, KeyboardInterrupt):
            return
        except (pickle.PicklingError, TypeError, AttributeError):
            connection.send((False, RuntimeError(repr(answer[1]))))


@contextmanager
def executor(
    workers: int, scheduler: str | None = None, prepare: Callable[[], object] = lambda: None
) -> Iterator[Executor]:
    """Start the processes, or connect to the cluster.

    Parameters
    ----------
    workers : int
        Processes; below 1 all is done in this one.
    scheduler : str, optional
        Address of a Dask scheduler, whose workers run the tasks instead.
    prepare : callable
        Called before a process is forked, to import and compile what its tasks need.

    Raises
    ------
    KilledError
        A process was killed, most likely for want of memory.
    UsageError
        No cluster there, or no Dask here.
    """
    if scheduler is not None:
        with _cluster(scheduler) as cluster:
            yield cluster
        return
    forked = workers == 1 and sys.platform == "linux"
    if workers < 1 or (workers == 1 and not forked):
        yield _InThisProcess()
        return
    if forked:
        prepare()
    pool = _Processes(workers, multiprocessing.get_context("fork" if forked else "spawn"))
    try:
        yield pool
    finally:
        for worker in pool.workers:
            worker.end()


@contextmanager
def _cluster(address: str) -> Iterator[Executor]:
    try:
        from distributed import Client, KilledWorker
    except ImportError:
        raise UsageError("--scheduler needs Dask: pip install 'megacell-store[dask]'") from None
    try:
        client: Any = Client(address, timeout=10)  # type: ignore[no-untyped-call]
    except (OSError, ValueError) as error:
        raise UsageError(f"--scheduler {address}: no Dask scheduler answers ({error}); check the address") from None
    with client:
        try:
            yield client.get_executor(pure=False, retries=0)
        except KilledWorker as error:
            fix = "give its workers more memory, or find the file that ends them with --workers 1"
            raise KilledError(f"--scheduler {address}: {error}; {fix}") from None


def cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def fitting_workers(workers: int | None, memory: int) -> int:
    """Return how many processes, at most as many as cores or as asked for, stay within so many bytes of memory.

    Raises
    ------
    UsageError
        Not even one does, or fewer than one is asked for.
    """
    if workers is not None and workers < 1:
        raise UsageError(f"--workers {workers}: give 1 or more")
    if memory < OF_A_WORKER:
        raise UsageError(f"--memory: a process of a conversion needs {OF_A_WORKER >> 20} MB; give more")
    wanted = cores() if workers is None else workers
    return 1 if wanted == 1 else max(1, min(wanted, memory // OF_A_WORKER - 1))  # one for the process that plans


def parse_bytes(text: str) -> int:
    """Read "4G", "500M" or a number of bytes."""
    number, unit = text.strip().upper().removesuffix("B").removesuffix("I"), 0
    if number[-1:] in _UNITS:
        number, unit = number[:-1], _UNITS[number[-1]]
    try:
        value = int(float(number) * (1 << unit))
    except (ValueError, OverflowError):
        raise UsageError(f"{text!r} is no amount of memory; give 4G, 500M or bytes") from None
    if value < 1:
        raise UsageError(f"{text!r} is no amount of memory; give 4G, 500M or bytes")
    return value
