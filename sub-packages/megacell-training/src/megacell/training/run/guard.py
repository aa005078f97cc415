# SPDX-License-Identifier: Apache-2.0
"""Which steps are left out: those whose loss or gradients are not finite, or far above what they usually are."""

import csv
import math
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import Any

from megacell.training.run.csv_file import keep_rows


class Guard:
    """Judges each step before its update, from figures that are the same on all ranks.

    Parameters
    ----------
    loss, grad_norm : float or None
        A step is skipped if it exceeds so many times the running median; None: only if it is not finite.
    window : int
        Steps of the running medians, of those that were not skipped; until there are as many, only what is not finite
        is skipped.
    stop_after : int
        Skipped steps in a row after which the run is to end.

    Attributes
    ----------
    skipped : int
        Steps skipped in a row, up to now.
    """

    def __init__(self, loss: float | None, grad_norm: float | None, window: int, stop_after: int):
        self.most = {"loss": loss, "gradient norm": grad_norm}
        self.usual: dict[str, deque[float]] = {name: deque(maxlen=window) for name in self.most}
        self.window, self.stop_after = window, stop_after
        self.skipped = 0

    def ratios(self, loss: float, grad_norm: float) -> dict[str, float]:
        """Return how many times its running median each figure is; NaN before the first step and where it is NaN."""
        given = zip(self.usual.items(), (loss, grad_norm), strict=True)
        return {name: value / median(seen) if seen and median(seen) else math.nan for (name, seen), value in given}

    def judge(self, loss: float, grad_norm: float, overflow: bool = False) -> str | None:
        """Return why a step is to be skipped, None where it is to be taken.

        Parameters
        ----------
        loss, grad_norm : float
            Mean over the items of all ranks; over all ranks, before clipping.
        overflow : bool
            The gradients overflowed in 16 bits: that is for the loss scale to mend, the step counts neither way.
        """
        reason = self._reason({"loss": loss} if overflow else {"loss": loss, "gradient norm": grad_norm})
        if reason:
            self.skipped += 1
        elif not overflow:
            self.skipped = 0
            self.usual["loss"].append(loss)
            self.usual["gradient norm"].append(grad_norm)
        return reason

    def _reason(self, figures: dict[str, float]) -> str | None:
        for name, value in figures.items():
            seen, most = self.usual[name], self.most[name]
            if not math.isfinite(value):
                return f"its {name} is {value}"
            if most is not None and len(seen) == self.window and value > most * median(seen):
                return f"its {name} is {value:.4g}, over {most:g} times the usual {median(seen):.4g}"
        return None

    @property
    def exhausted(self) -> bool:
        """Whether so many steps in a row were skipped that the run is to end."""
        return self.skipped >= self.stop_after

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint keeps, so that a run that goes on judges alike."""
        return {"skipped": self.skipped, **{name: list(seen) for name, seen in self.usual.items()}}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from what a checkpoint kept."""
        self.skipped = state["skipped"]
        for name, seen in self.usual.items():
            seen.extend(state[name])


class SkippedFile:
    """skipped.csv of a run: a row for each skipped step, with its cells; rows past where it resumes are dropped."""

    COLUMNS = ("step", "reason", "loss", "grad_norm", "cells")

    def __init__(self, path: Path, first_step: int):
        self.path = path
        if path.exists():
            keep_rows(path, self.COLUMNS, first_step)

    def write(self, row: Mapping[str, Any]) -> None:
        """Append one row."""
        new = not self.path.exists()
        with open(self.path, "a", newline="") as file:
            writer = csv.DictWriter(file, self.COLUMNS)
            if new:
                writer.writeheader()
            writer.writerow(row)
