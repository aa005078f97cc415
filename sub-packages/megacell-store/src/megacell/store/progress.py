# SPDX-License-Identifier: Apache-2.0
"""A progress bar where there is a terminal, nothing where there is none."""

from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import Any, Self, TypeVar

Item = TypeVar("Item")


class Progress:
    """Shows how far a conversion is; a context manager.

    Parameters
    ----------
    show : bool
        False never shows anything.
    """

    def __init__(self, *, show: bool) -> None:
        self._bar: Any = None
        self._task: Any = None
        if show:
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
            from rich.progress import Progress as Bar

            console = Console(stderr=True)
            if console.is_terminal:
                columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
                self._bar = Bar(*columns, console=console, transient=True)

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
        if self._bar:
            if self._task is not None:
                self._bar.remove_task(self._task)
            self._task = self._bar.add_task(text, total=total)

    def advance(self, units: int) -> None:
        """Count units of the step as done."""
        if self._bar:
            self._bar.advance(self._task, units)

    def say(self, text: str) -> None:
        """Change the step's text."""
        if self._bar:
            self._bar.update(self._task, description=text)

    def steps(self, text: str, items: Sequence[Item]) -> Iterator[Item]:
        """Yield the items, a unit each."""
        self.start(text, len(items))
        for item in items:
            yield item
            self.advance(1)
