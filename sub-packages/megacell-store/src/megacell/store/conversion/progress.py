# SPDX-License-Identifier: Apache-2.0
"""How far a conversion is, read from the files that its processes write."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from megacell.core.files import TEMPORARY
from megacell.core.progress import Progress

if TYPE_CHECKING:
    from pathlib import Path

    from megacell.store.conversion.plan import Plan

_LOOK = 0.5  # seconds between looks at what was written
_HEADER, _CELL = 128, 4  # bytes of panels.npy: its header, and each cell


@contextmanager
def watching(bar: Progress, plan: "Plan") -> Iterator[None]:
    """Show how many cells of a plan are written, by whatever process on whatever machine: its files tell."""
    if not bar.show:
        yield
        return
    bar.start("converting cells", sum(found.cells for found in plan.inspections))
    done = threading.Event()

    def look() -> None:
        while not done.wait(_LOOK):
            bar.reach(_written(plan))

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def _written(plan: "Plan") -> int:
    cells = 0
    folder = plan.store / "shards"
    for name in plan.names:
        sizes = [_size(each) for each in (folder / name, *folder.glob(f"{name}-*{TEMPORARY}"))]
        cells += max(0, max(sizes) - _HEADER) // _CELL
    return cells


def _size(shard: "Path") -> int:
    try:
        return (shard / "panels.npy").stat().st_size
    except OSError:
        return 0
