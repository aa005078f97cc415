# SPDX-License-Identifier: Apache-2.0
"""Steps made ahead of their use, by threads; given in order, errors and waiting time included.

Threads, not processes: making a batch is compiled and holds no lock on the interpreter, so that threads run side by
side, and a process has to copy every batch (``benchmarks/loader.py`` measures both).
"""

import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

from megacell.core.errors import UsageError

Step = TypeVar("Step")
NAME = "megacell-batches"  # begins the threads' names


class Prefetched(Iterator[Step], Generic[Step]):
    """Iterator over steps first … last - 1 (endless without last); a context manager that leaves no thread behind.

    What it gives does not depend on the number of threads.

    Parameters
    ----------
    make : callable
        Makes a step from its number; called by several threads at once.
    first, last : int
        Steps to make.
    threads : int
        That make steps in the background; 0: each step is made when it is asked for.
    depth : int
        Steps that each thread is ahead.

    Attributes
    ----------
    wait_seconds : float
        How long the consumer has waited for steps so far.

    Raises
    ------
    UsageError
        Fewer than 0 threads, a depth below 1.
    """

    def __init__(self, make: Callable[[int], Step], first: int, last: int | None, *, threads: int, depth: int) -> None:
        if threads < 0 or depth < 1:
            raise UsageError(f"{threads} threads that prefetch {depth} steps each: give 0 or more, and 1 or more")
        self.wait_seconds = 0.0
        self._make, self._next, self._last = make, first, last
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix=NAME) if threads else None
        self._ahead: deque[Future[Step]] = deque()
        for _ in range(threads * depth):
            self._submit()

    def _submit(self) -> None:
        if self._pool is not None and not self._at_end():
            self._ahead.append(self._pool.submit(self._make, self._next))
            self._next += 1

    def _at_end(self) -> bool:
        return self._last is not None and self._next >= self._last

    def __next__(self) -> Step:
        if not self._ahead and (self._pool is not None or self._at_end()):
            self.close()
            raise StopIteration
        start = time.perf_counter()
        try:
            step = self._ahead.popleft().result() if self._ahead else self._made_now()
        except BaseException:
            self.close()
            raise
        self.wait_seconds += time.perf_counter() - start
        self._submit()
        return step

    def _made_now(self) -> Step:
        step = self._make(self._next)
        self._next += 1
        return step

    def close(self) -> None:
        """Drop what was made ahead and wait for the threads to end; may be called again."""
        self._ahead.clear()
        self._last = self._next
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)

    def __enter__(self) -> "Prefetched[Step]":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
