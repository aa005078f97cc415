# SPDX-License-Identifier: Apache-2.0
"""One training run as the module meets it: its data, initial weights, steps, figures, checkpoints and end."""

import contextlib
import json
import math
import time
from collections.abc import Iterator
from dataclasses import fields
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import megatron.core
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from omegaconf import DictConfig, OmegaConf

from megacell.core.errors import DataError
from megacell.core.files import write_whole
from megacell.training.checkpoint import checkpoint
from megacell.training.checkpoint.saver import Saver
from megacell.training.config import settings
from megacell.training.distributed import launch
from megacell.training.distributed.signals import Signals
from megacell.training.engine import Engine, StepResult
from megacell.training.family import Baselines, MicroBatch, Prefetched, Stream, find_family
from megacell.training.run.guard import Guard, SkippedFile
from megacell.training.run.metrics import Measure, MetricsFile, Screen, StepSums
from megacell.training.run.recorded import check_ranks_agree
from megacell.training.run.run_readme import write_readme


class Module(Protocol):
    """What a run asks of the Lightning module that trains: network and engine on this rank, and their trainer."""

    network: Any
    engine: Engine
    trainer: Any

    @property
    def device(self) -> torch.device: ...
    def held_out_loss(self) -> tuple[float, int]: ...


class Run:
    """The run of one rank. Rank 0 also writes the run folder and the terminal.

    Parameters
    ----------
    cfg : DictConfig
        From `settings.compose`.

    Attributes
    ----------
    cfg : DictConfig
    family_run : FamilyRun
        Data and network.
    layout : Layout
    step : int
        Optimizer steps done.
    """

    device: torch.device  # this and what follows stand from `begin` on
    metadata: dict[str, Any]
    saver: Saver
    best_loss: float
    metrics: MetricsFile
    skipped: SkippedFile
    prefetched: Prefetched
    sums: StepSums  # of the last step
    overflow: bool

    def __init__(self, cfg: DictConfig):
        self.cfg, self.out, self.first = cfg, Path(cfg.out), launch.is_first()
        self.found, self.passed_over = checkpoint.newest(self.out / "checkpoints") if cfg.resume else (None, [])
        self.family = find_family(cfg.family)
        self.layout = settings.layout(cfg)
        self.family_run = self.family.open(cfg, checkpoint.read_facts(self.found) if self.found else None)
        self.family_run.stream()  # refuses settings that no batch can be made with, before a folder is
        self.step = 0
        self.stopped = False
        self.baselines = Baselines()
        self.held_out_loss = math.nan
        self.measure = Measure()
        self.guard = Guard(**cfg.guard)
        self.signals = Signals()
        self.closing = contextlib.ExitStack()
        self.screen = Screen(cfg.steps, shown=self.first)
        if self.first:
            self._make_folder()
        for line in self.family_run.lines:
            self.screen.line(line)

    def _make_folder(self) -> None:
        """Keep beside the run what it needs to be resumed, exported and understood."""
        self.out.mkdir(parents=True, exist_ok=True)
        if not self.cfg.resume:
            self.family_run.write_inputs(self.out)
            paths = {name: str(Path(self.cfg[name]).resolve()) for name in self.family.inputs}
            own = OmegaConf.masked_copy(self.cfg, [str(name) for name in self.cfg if name not in settings.ELSEWHERE])
            text = OmegaConf.to_yaml(OmegaConf.merge(own, paths, {"resume": False}))
            write_whole(self.out / settings.SAVED, text.encode())
        write_readme(self.out, self.cfg, self.family_run.about(self.out))

    # before the first step

    def begin(self, module: Module) -> None:
        """Go on from the newest whole checkpoint, or from step 0; network, optimizer and process groups stand."""
        inputs = ", ".join(str(self.cfg[name]) for name in self.family.inputs[:1])
        check_ranks_agree(self.family_run.digest, inputs, module.device)
        self.device = module.device
        checkpoint.begin_state(module.engine.optimizer)
        if self.cfg.resume:
            self._load_newest(module)
        self.metadata = self._metadata()
        folder, choice = self.out / "checkpoints", self.cfg.checkpoint
        if self.first:
            folder.mkdir(exist_ok=True)
        self.saver = Saver(
            folder, module.network, module.engine.optimizer, keep=choice.keep, best=choice.best,
            asynchronous=choice.asynchronous,
        )  # fmt: skip
        self.best_loss = self._of_the_first(checkpoint.best_loss(folder)) if choice.best else -math.inf
        if self.first:
            self.metrics = MetricsFile(self.out / "metrics.csv", self.step)
            self.skipped = SkippedFile(self.out / "skipped.csv", self.step)
            self.baselines = self.family_run.baselines(self.out)
            if self.baselines.line:
                self.screen.line(self.baselines.line)
        self._describe(module)
        self.screen.start(self.step)

    def _load_newest(self, module: Module) -> None:
        for line in self.passed_over:
            self.screen.line(line)
        if self.found is None:
            self.screen.line(f"{self.out}: no whole checkpoint yet: starting from step 0")
            return
        facts = checkpoint.read_facts(self.found)
        self.family_run.check_facts(facts, self.found)
        if "stream" in facts:  # not in a checkpoint of before this was recorded
            self.stream.step_of(facts["stream"])
        checkpoint.load(self.found, module.network, module.engine.optimizer)
        self.step = facts["step"]
        self.guard.restore(facts.get("guard", self.guard.state()))
        self.held_out_loss = facts.get("held_out_loss", math.nan)
        module.engine.scheduler.step(self.step)
        self._tell_lightning(module)
        self.screen.line(f"resuming at step {self.step} from {self.found}")

    def _metadata(self) -> dict[str, Any]:
        """Return what a checkpoint says of itself."""
        return {
            "family": self.family.name,
            "precision": self.cfg.precision,
            **self.family_run.facts(),
            "ranks": {"world": dist.get_world_size(), "tensor": self.cfg.parallel.tensor},
            "versions": {"torch": torch.__version__, "megatron-core": megatron.core.__version__},
        }

    def _describe(self, module: Module) -> None:
        size = sum(p.numel() for p in module.network.parameters())
        copies, layout = parallel_state.get_data_parallel_world_size(), self.layout
        self.screen.line(
            f"model: {size:,} parameters a rank, {layout.precision}; {copies} data x {layout.tensor} "
            f"tensor{' and sequence' if layout.sequence else ''} parallel on {self.device.type}; "
            + self.family_run.describe(module.network)
            + ("; compiled" if layout.compiled else "")
            + ("; deterministic" if layout.deterministic else "")
            + (f"; computed twice: {layout.recompute}" if layout.recompute != "none" else "")
        )

    # its batches

    @cached_property
    def stream(self) -> Stream:
        """The training steps of this rank."""
        return self._stream()

    def steps(self) -> Iterator[list[MicroBatch]]:
        """Yield this rank's micro-batches, a step at a time, from where the run stands.

        A generator, because NeMo asks for more than one and uses the last: no thread starts before it is used.
        """
        self.prefetched = self.closing.enter_context(self._ahead(self.stream, self.step, self.cfg.steps))
        yield from self.prefetched

    def held_out(self) -> Iterator[list[MicroBatch]]:
        """Yield this rank's share of the held-out cells."""
        with self._ahead(self._stream(held_out=True)) as ahead:
            yield from ahead

    def _ahead(self, stream: Stream, first: int = 0, last: int | None = None) -> Prefetched:
        return stream.prefetched(first, last, threads=self.cfg.data.threads, depth=self.cfg.data.prefetch)

    def _stream(self, *, held_out: bool = False) -> Stream:
        return self.family_run.stream(
            held_out=held_out,
            rank=parallel_state.get_data_parallel_rank(),
            ranks=parallel_state.get_data_parallel_world_size(),
            tensor=self.cfg.parallel.tensor,
        )

    # in each step, before its update

    def accept(self, loss_sum: float, items: int, grad_norm: float | None) -> bool:
        """Add the step's figures up over all ranks, and say whether to make the update; on all ranks alike."""
        self.overflow = grad_norm is None
        self.sums = self._reduce(loss_sum, items, math.inf if grad_norm is None else grad_norm)
        loss = self.sums.loss / self.sums.items
        ratios = self.guard.ratios(loss, math.nan if self.overflow else self.sums.grad_norm)
        reason = self.guard.judge(loss, self.sums.grad_norm, self.overflow)
        self.measure.add(self.sums, ratios, skipped=reason is not None)
        if reason:
            self._tell_skipped(reason, loss)
        return reason is None

    def _reduce(self, loss_sum: float, items: int, grad_norm: float) -> StepSums:
        """Sum up over all ranks in one go; tensor parallel ranks have the same figures, of which one rank's count."""
        mine = (loss_sum, items, 0.0, self.measure.tokens, self.measure.cells)
        counts = parallel_state.get_tensor_model_parallel_rank() == 0
        figures = torch.zeros(len(fields(StepSums)), dtype=torch.float64)
        if counts:
            figures[: len(mine)] = torch.tensor(mine)
        if dist.get_rank() == 0:
            figures[2] = grad_norm
        figures[len(mine) :] = torch.tensor([self.signals.received is not None, self.saver.written])
        figures = figures.to(self.device)
        dist.all_reduce(figures)
        return StepSums(*figures.tolist())

    def _tell_skipped(self, reason: str, loss: float) -> None:
        """Log the cells of a skipped step, which are spread over the ranks."""
        parts: list[list[int]] = [[] for _ in range(dist.get_world_size())]
        counts = parallel_state.get_tensor_model_parallel_rank() == 0
        dist.all_gather_object(parts, self.measure.cell_numbers if counts else [])
        cells = sorted(cell for part in parts for cell in part)
        named = ", ".join(map(str, cells[:8])) + (f" and {len(cells) - 8} more" if len(cells) > 8 else "")
        self.screen.line(f"step {self.step + 1} skipped: {reason}; cells {named} (all in skipped.csv)")
        if self.first:
            row = {"step": self.step + 1, "reason": reason, "loss": loss, "grad_norm": self.sums.grad_norm}
            self.skipped.write({**row, "cells": " ".join(map(str, cells))})

    # after each step

    def after_step(self, module: Module, result: StepResult) -> None:
        """Count the step, log, validate, save, and stop where a signal asked for it; on all ranks alike."""
        self.step += 1
        self._tell_lightning(module)
        self.stopped = self.sums.signals > 0
        if self.sums.written == dist.get_world_size():
            self.saver.commit()
        if self.overflow:
            self.screen.line(
                f"step {self.step}: gradients overflowed in fp16: update left out, loss scale now {result.loss_scale:g}"
            )
        done = self.step >= self.cfg.steps
        last = done or self.stopped or self.guard.exhausted
        row: dict[str, float] = {}
        if self.step % self.cfg.log_every == 0 or last:
            figures = self.measure.window(self.prefetched.wait_seconds)
            row = {"step": self.step, **figures, "grad_norm": self.sums.grad_norm, "lr": result.lr}
        paused = time.perf_counter()
        if self.step % self.cfg.validation.every == 0 or done:
            row.setdefault("step", self.step)
            self.held_out_loss, _ = module.held_out_loss()
            row["held_out_loss"] = self.held_out_loss
        if not self.guard.exhausted:
            self._save(row, due=self.step % self.cfg.checkpoint.every == 0 or last, wait=last)
        self.measure.pause(time.perf_counter() - paused)
        if self.first:
            self._tell(module, row)
        if self.guard.exhausted:
            self._give_up()
        module.trainer.should_stop = module.trainer.should_stop or self.stopped

    def _save(self, row: dict[str, float], *, due: bool, wait: bool) -> None:
        """Save where it is due, and where the held-out loss is the lowest so far."""
        loss = self._of_the_first(row["held_out_loss"]) if "held_out_loss" in row else math.inf
        if due or loss < self.best_loss:
            started = time.perf_counter()
            known = {"held_out_loss": loss} if math.isfinite(loss) else {}
            stood = {"stream": self.stream.state_dict(self.step), "guard": self.guard.state()}
            self.saver.save(self.step, {**self.metadata, **known, **stood})
            if wait:
                self.saver.wait()
            row.setdefault("step", self.step)
            row["save_stall"] = round(time.perf_counter() - started, 3)
        self.best_loss = min(loss, self.best_loss)

    def _of_the_first(self, value: float) -> float:
        """Return rank 0's value on all ranks, which decide by it."""
        shared = torch.tensor([value], dtype=torch.float64, device=self.device)
        dist.broadcast(shared, src=0)
        return float(shared)

    def _give_up(self) -> None:
        self.saver.wait()
        first = self.step - self.guard.skipped + 1
        raise DataError(
            f"{self.out}: all steps from {first} to {self.step} were skipped (skipped.csv says why): "
            "go on from the checkpoint before by resume=true, with a lower optim.lr or higher guard.*"
        )

    def _tell_lightning(self, module: Module) -> None:
        """Set Lightning's count of steps, which it takes from optimizers that it drives itself."""
        module.trainer.fit_loop.epoch_loop.manual_optimization.optim_step_progress.total.completed = self.step

    def _tell(self, module: Module, row: dict[str, float]) -> None:
        figures = f"loss {row['loss']:.3f}, {row['tokens_per_second']:,.0f} tokens/s" if "loss" in row else None
        self.screen.advance(self.step, figures)
        if not row:
            return
        self.metrics.write(row)
        for logger in module.trainer.loggers:
            logger.log_metrics({k: v for k, v in row.items() if k != "step"}, step=self.step)
        if "held_out_loss" in row:
            beside = f" ({self.baselines.short})" if self.baselines.short else ""
            self.screen.line(
                f"step {self.step}: held-out loss {row['held_out_loss']:.3f} {self.family_run.unit}{beside}"
            )

    def close(self) -> None:
        """End the threads that prepare steps, however the run ended."""
        self.closing.close()

    def finish(self) -> int:
        """Close everything; returns the exit code."""
        self.screen.stop()
        self.signals.release()
        finished = self.step >= self.cfg.steps
        if self.first:
            self.metrics.close()
            summary = {"step": self.step, "finished": finished, **self.baselines.losses}
            if finished:
                summary["held_out_loss"] = self.held_out_loss
            (self.out / "summary.json").write_text(json.dumps(summary, indent=1))
        if finished:
            return 0
        again = f"megacell pretrain out={self.out} resume=true"
        self.screen.line(f"stopped by a signal at step {self.step}, after a save; to go on: {again}")
        return launch.INTERRUPTED
