# SPDX-License-Identifier: Apache-2.0
"""An end to reading that never ends: HDF5 can loop for ever on a damaged file, within a call that nothing interrupts.

A process that was made for the work is ended by the system once one call has used too much processor time; whoever
started it is told (`executors`). Waiting for a slow disk uses none.
"""

import multiprocessing
import signal
from collections.abc import Iterator
from contextlib import contextmanager

SECONDS = 120.0  # of processor time; no call that reads a block comes near it
_expendable = False


def make_expendable() -> None:
    """Let this process be ended where a call gets stuck, and by a mapped file that is cut short: its parent tells."""
    global _expendable
    signal.signal(signal.SIGBUS, signal.SIG_DFL)
    _expendable = hasattr(signal, "setitimer")


def is_abandoned() -> bool:
    """True in a process whose conversion was killed: the work is another one's now."""
    parent = multiprocessing.parent_process()
    return parent is not None and not parent.is_alive()


@contextmanager
def watched() -> Iterator[None]:
    """Watch over a stretch of reading; nested stretches are watched on their own."""
    if not _expendable:
        yield
        return
    outer, _ = signal.setitimer(signal.ITIMER_VIRTUAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, outer)
