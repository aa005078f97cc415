# SPDX-License-Identifier: Apache-2.0
"""A progress bar where there is a terminal; where there is none, a line on standard error now and then."""

import sys
import time
from collections.abc import Iterable, Iterator
from types import TracebackType
from typing import Any, Self, TypeVar

Item = TypeVar("Item")
EVERY = 30.0  # seconds between lines where there is no terminal


class Progress:
    """Shows how far each step of a work is; a context manager.

    Parameters
    ----------
    show : bool
        False never shows anything.
    """

    def __init__(self, *, show: bool) -> None:
        self._bar: Any = None
        self._task: Any = None
        self.show = show
        self._text, self._total, self._done, self._begun, self._printed = "", 0, 0, 0.0, 0.0
        if show and sys.stderr.isatty():  # rich would also go by FORCE_COLOR, which Jupyter sets for what it starts
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
            from rich.progress import Progress as Bar

            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
            self._bar = Bar(*columns, console=Console(stderr=True), transient=True)

    def __enter__(self) -> Self:
        if self._bar:
            self._bar.start()
        return self

    def __exit__(
        self, _type: type[BaseException] | None, _error: BaseException | None, _traceback: TracebackType | None
    ) -> None:
        if self._bar:
            self._bar.stop()

    def start(self, text: str, total: int) -> None:
        """Begin a step of `total` units."""
        self._text, self._total, self._done = text, total, 0
        self._begun = self._printed = time.monotonic()
        if self._bar:
            if self._task is not None:
                self._bar.remove_task(self._task)
            self._task = self._bar.add_task(text, total=total)

    def advance(self, units: int) -> None:
        """Count units of the step as done."""
        self.reach(self._done + units)

    def reach(self, done: int) -> None:
        """Set how many units of the step are done."""
        self._done = done
        if self._bar:
            self._bar.update(self._task, completed=done)
        elif self.show and time.monotonic() - self._printed > EVERY:
            self._printed = time.monotonic()
            print(self.line(self._printed - self._begun), file=sys.stderr, flush=True)

    def line(self, seconds: float) -> str:
        """Return how far the step is after so many seconds, and when it will be done."""
        rate = self._done / max(seconds, 1e-9)
        left = (self._total - self._done) / rate if rate else float("inf")
        eta = f"{left / 60:,.0f} min left" if left < 1e7 else "time left unknown"
        share = f"{self._done:,} of {self._total:,} ({self._done / max(1, self._total):.0%})"
        return f"{self._text}: {share}, {rate:,.0f}/s, {eta}"

    def steps(self, text: str, items: Iterable[Item], total: int) -> Iterator[Item]:
        """Yield the items, a unit each."""
        self.start(text, total)
        for item in items:
            yield item
            self.advance(1)
