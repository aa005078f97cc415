# SPDX-License-Identifier: Apache-2.0
"""What a run tells while it goes: metrics.csv, TensorBoard, a progress bar, a line a validation."""

import csv
import math
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from megacell.core.machine import peak_memory
from megacell.training.family import MicroBatch
from megacell.training.run.csv_file import keep_rows

COLUMNS = (  # masked_tokens: the items, by the name that users' scripts know
    "step", "loss", "grad_norm", "lr", "masked_tokens", "tokens_per_second", "data_wait", "engine",
    "memory_gib", "cells", "tokens", "held_out_loss",
    "loss_spike", "grad_norm_spike", "skipped", "save_stall",
)  # fmt: skip
SPIKES = ("loss_spike", "grad_norm_spike")


@dataclass
class StepSums:
    """A step's figures over all ranks, the same on each.

    Attributes
    ----------
    loss, items : float
        Loss summed over the items (masked genes, say), and their number.
    grad_norm : float
        Before clipping.
    tokens, cells : float
        Real tokens and cells.
    signals, written : float
        Ranks that have received a signal; ranks that have nothing left to write of the last checkpoint.
    """

    loss: float
    items: float
    grad_norm: float
    tokens: float
    cells: float
    signals: float
    written: float


def memory_gib() -> float:
    """Return this process's peak memory: of the GPU where there is one, else resident."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    return peak_memory() / 2**30


class Measure:
    """Counts this rank's work between two lines of metrics.csv."""

    def __init__(self) -> None:
        self.tokens = self.cells = 0
        self.cell_numbers: list[int] = []
        self.window_tokens = self.window_items = self.window_cells = 0.0
        self.window_loss = 0.0
        self.window_spikes: dict[str, float] = {}
        self.window_skipped = 0
        self.window_start = time.perf_counter()
        self.wait_start = 0.0
        self.engine_seconds = 0.0

    def start_step(self, batch: list[MicroBatch]) -> None:
        """Note what this rank has to do in the step: real tokens and cells, padding left out."""
        self.tokens = sum(b.n_tokens for b in batch)
        self.cell_numbers = [int(cell) for b in batch for cell in b.cells]
        self.cells = len(self.cell_numbers)

    def add(self, step: "StepSums", ratios: dict[str, float], skipped: bool) -> None:
        """Add a step; ``ratios``: its loss and gradient norm as multiples of the usual ones, by `SPIKES`' order."""
        self.window_tokens += step.tokens
        self.window_cells += step.cells
        self.window_skipped += skipped
        if not skipped:
            self.window_loss += step.loss
            self.window_items += step.items
        for name, ratio in zip(SPIKES, ratios.values(), strict=True):
            if not math.isnan(ratio):
                self.window_spikes[name] = max(ratio, self.window_spikes.get(name, 0.0))

    def window(self, waited: float) -> dict[str, float]:
        """Return the figures since the last call, and start anew; ``waited``: seconds waited for data in all."""
        seconds = time.perf_counter() - self.window_start
        figures = {
            "loss": self.window_loss / self.window_items if self.window_items else math.nan,
            "masked_tokens": int(self.window_items),
            "tokens": int(self.window_tokens),
            "cells": int(self.window_cells),
            "tokens_per_second": round(self.window_tokens / seconds, 1),
            "data_wait": round((waited - self.wait_start) / seconds, 4),
            "engine": round(self.engine_seconds / seconds, 4),
            "memory_gib": round(memory_gib(), 3),
            "skipped": self.window_skipped,
            **self.window_spikes,
        }
        self.window_loss = self.window_items = self.window_tokens = self.window_cells = self.engine_seconds = 0.0
        self.window_spikes, self.window_skipped = {}, 0
        self.window_start, self.wait_start = time.perf_counter(), waited
        return figures

    def pause(self, seconds: float) -> None:
        """Leave ``seconds`` (a validation, a checkpoint) out of the rates."""
        self.window_start += seconds


class MetricsFile:
    """metrics.csv of a run: one row every ``log_every`` steps; rows past the step that a run resumes at are dropped."""

    def __init__(self, path: Path, first_step: int):
        keep_rows(path, COLUMNS, first_step)
        self.file = open(path, "a", newline="")  # noqa: SIM115
        self.writer = csv.DictWriter(self.file, COLUMNS)

    def write(self, row: dict[str, float]) -> None:
        """Append one row."""
        self.writer.writerow(row)
        self.file.flush()

    def close(self) -> None:
        """Close the file."""
        self.file.close()


class Screen:
    """The terminal: a bar where there is one, plain lines either way; silent on all ranks but the first."""

    def __init__(self, steps: int, shown: bool):
        self.console = Console(file=sys.stdout, quiet=not shown, highlight=False, soft_wrap=True)
        self.bar = Progress(
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
            TextColumn("{task.fields[figures]}"),
            console=self.console, disable=not shown or not sys.stdout.isatty(), transient=True,
        )  # fmt: skip
        self.figures = ""
        self.task = self.bar.add_task("training", total=steps, figures=self.figures)

    def line(self, text: str) -> None:
        """Print one line."""
        self.console.print(text, markup=False)

    def start(self, step: int) -> None:
        """Show the bar."""
        self.bar.update(self.task, completed=step)
        self.bar.start()

    def advance(self, step: int, figures: str | None = None) -> None:
        """Move the bar."""
        self.figures = self.figures if figures is None else figures
        self.bar.update(self.task, completed=step, figures=self.figures)

    def stop(self) -> None:
        """Take the bar away."""
        self.bar.stop()
