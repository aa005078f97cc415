# SPDX-License-Identifier: Apache-2.0
"""The signals that end a run: noted, so that the step in hand is finished and saved."""

import signal
from typing import Any


class Signals:
    """Notes SIGTERM, SIGUSR1 and Ctrl-C: the step in hand is finished and saved; a second Ctrl-C ends at once."""

    def __init__(self) -> None:
        self.received: int | None = None
        self._previous: dict[int, Any] = {}

    def watch(self) -> None:
        """Take the signals over."""
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            self._previous[number] = signal.signal(number, self._note)

    def release(self) -> None:
        """Give the signals back."""
        while self._previous:
            number, handler = self._previous.popitem()
            signal.signal(number, handler)

    def _note(self, number: int, frame: object) -> None:
        if self.received == number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = number
