# SPDX-License-Identifier: Apache-2.0
"""Where tasks run: in this process, in several of this machine, or on a Dask cluster."""

import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import get_context
from typing import Any, Protocol, TypeVar

from megacell.store.errors import DataError, UsageError

Result = TypeVar("Result")
MEMORY = 4 << 30  # bytes of a conversion's processes together
OF_A_WORKER = 400 << 20  # what one process takes at most: Python and its libraries 250 MB, blocks in flight the rest
_UNITS = {"K": 10, "M": 20, "G": 30, "T": 40}


class Executor(Protocol):
    """What runs a function over items, results in the items' order."""

    def map(self, function: Callable[..., Result], *items: Iterable[Any]) -> Iterable[Result]:
        """As the built-in map."""


class _Here:
    def map(self, function: Callable[..., Result], *items: Iterable[Any]) -> Iterable[Result]:
        return map(function, *items)


@contextmanager
def executor(workers: int, scheduler: str | None = None) -> Iterator[Executor]:
    """Start the processes, or meet the cluster.

    Raises
    ------
    DataError
        A process died, most likely for want of memory.
    UsageError
        No cluster there, or no Dask here.
    """
    if scheduler is not None:
        with _cluster(scheduler) as cluster:
            yield cluster
    elif workers <= 1:
        yield _Here()
    else:
        try:
            with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
                try:
                    yield pool
                except BaseException:
                    pool.shutdown(wait=True, cancel_futures=True)
                    raise
        except BrokenProcessPool:
            mend = "give fewer --workers and run it again: finished shards are kept"
            raise DataError(f"a process of the conversion died, for want of memory perhaps; {mend}") from None


@contextmanager
def _cluster(address: str) -> Iterator[Executor]:
    try:
        from distributed import Client
    except ImportError:
        raise UsageError("--scheduler needs Dask: pip install 'megacell-store[dask]'") from None
    try:
        client: Any = Client(address, timeout=10)  # type: ignore[no-untyped-call]
    except (OSError, ValueError) as error:
        raise UsageError(f"--scheduler {address}: no Dask scheduler answers ({error}); check the address") from None
    with client:
        yield client.get_executor(pure=False, retries=0)


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
