# SPDX-License-Identifier: Apache-2.0
"""One training run as the module meets it: its data, initial weights, steps, figures, checkpoints and end."""

import contextlib
import json
import math
import shutil
import time
from collections.abc import Iterator
from dataclasses import asdict, fields
from functools import cached_property
from pathlib import Path

import megatron.core
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from omegaconf import DictConfig, OmegaConf

from megacell.core.errors import DataError
from megacell.core.files import write_whole
from megacell.geneformer.baselines.frequency import TokenFrequency, frequency_log_prior
from megacell.geneformer.interchange.open import check_fit, load_into
from megacell.geneformer.model.bert import PackedBert
from megacell.geneformer.pretraining.data import (
    TrainingData,
    choice,
    fit_frequencies,
    frequency_losses,
    save_frequencies,
)
from megacell.geneformer.tokens.packing import MicroBatch
from megacell.geneformer.vocabulary.vocabulary import FILES
from megacell.store.sampling.batch_stream import BatchStream
from megacell.store.sampling.prefetched import Prefetched
from megacell.training.checkpoint import checkpoint
from megacell.training.checkpoint.saver import Saver
from megacell.training.config import settings
from megacell.training.distributed import launch
from megacell.training.distributed.signals import Signals
from megacell.training.engine import StepResult
from megacell.training.nn.attention_backends import choose_backend
from megacell.training.nn.weights import initialise
from megacell.training.run.guard import Guard, SkippedFile
from megacell.training.run.metrics import Measure, MetricsFile, Screen, StepSums
from megacell.training.run.recorded import check_ranks_agree, store_record
from megacell.training.run.run_readme import write_readme


class Run:
    """The run of one rank. Rank 0 also writes the run folder and the terminal.

    Attributes
    ----------
    cfg : DictConfig
    data : TrainingData
    network : ModelConfig
    step : int
        Optimizer steps done.
    """

    def __init__(self, cfg: DictConfig):
        self.cfg, self.out, self.first = cfg, Path(cfg.out), launch.is_first()
        self.found, self.passed_over = checkpoint.newest(self.out / "checkpoints") if cfg.resume else (None, [])
        record = checkpoint.read_facts(self.found)["store"] if self.found else None
        self.data = TrainingData.open(cfg, record)
        self.data.stream()  # refuses settings that no batch can be made with, before a folder is
        self.network, self.layout = settings.model_config(cfg, self.data.vocabulary.size), settings.layout(cfg)
        if cfg.init and not cfg.resume:
            check_fit(self.network, self.data.vocabulary, Path(cfg.init))  # before a folder is made, too
        self.step = 0
        self.stopped = False
        self.baselines: dict[str, float] = {}
        self.held_out_loss = math.nan
        self.measure = Measure()
        self.guard = Guard(**cfg.guard)
        self.signals = Signals()
        self.closing = contextlib.ExitStack()
        self.screen = Screen(cfg.steps, shown=self.first)
        if self.first:
            self._make_folder()
        for line in self.data.lines:
            self.screen.line(line)

    def _make_folder(self) -> None:
        """Keep beside the run what it needs to be resumed, exported and understood."""
        self.out.mkdir(parents=True, exist_ok=True)
        if not self.cfg.resume:
            (self.out / "vocabulary").mkdir(exist_ok=True)
            for name in FILES:  # no histograms: a run has no use for them
                shutil.copy2(Path(self.cfg.vocabulary) / name, self.out / "vocabulary" / name)
            paths = {name: str(Path(self.cfg[name]).resolve()) for name in ("store", "vocabulary")}
            own = OmegaConf.masked_copy(self.cfg, [str(name) for name in self.cfg if name not in settings.ELSEWHERE])
            text = OmegaConf.to_yaml(OmegaConf.merge(own, paths, {"resume": False}))
            write_whole(self.out / settings.SAVED, text.encode())
        write_readme(self.out, self.cfg, self.data)

    @cached_property
    def frequency(self) -> TokenFrequency:
        """The frequency baselines, fitted on training cells; the same on every rank."""
        return fit_frequencies(self.data, self.cfg.data.baseline_cells)

    # before the first step

    def fill(self, bert: PackedBert) -> None:
        """Give the network its initial weights."""
        if self.cfg.init and not self.cfg.resume:
            load_into(bert, self.network, self.data.vocabulary, Path(self.cfg.init))
            return
        bias = torch.from_numpy(frequency_log_prior(self.frequency)).float() if self.cfg.data.head_bias else None
        initialise(bert, self.network, self.cfg.seed, bias)

    def begin(self, module) -> None:
        """Go on from the newest whole checkpoint, or from step 0; network, optimizer and process groups stand."""
        check_ranks_agree(self.data.store, module.device)
        self.device = module.device
        checkpoint.begin_state(module.engine.optimizer)
        if self.cfg.resume:
            self._load_newest(module)
        self.facts = self._facts()
        folder, choice = self.out / "checkpoints", self.cfg.checkpoint
        if self.first:
            folder.mkdir(exist_ok=True)
        self.saver = Saver(
            folder, module.bert, module.engine.optimizer, keep=choice.keep, best=choice.best,
            asynchronous=choice.asynchronous,
        )  # fmt: skip
        self.best_loss = self._of_the_first(checkpoint.best_loss(folder)) if choice.best else -math.inf
        if self.first:
            self.metrics = MetricsFile(self.out / "metrics.csv", self.step)
            self.skipped = SkippedFile(self.out / "skipped.csv", self.step)
            save_frequencies(self.frequency, self.out / "baselines.npz")
            self.baselines = frequency_losses(self.frequency, self.data)
            self.screen.line(
                f"held-out baselines over {self.baselines['masked_genes']:,} masked genes: gene frequency "
                f"{self.baselines['frequency']:.3f} nats, frequency at that rank {self.baselines['rank_frequency']:.3f}"
            )
        self._describe(module)
        self.screen.start(self.step)

    def _load_newest(self, module) -> None:
        for line in self.passed_over:
            self.screen.line(line)
        if self.found is None:
            self.screen.line(f"{self.out}: no whole checkpoint yet: starting from step 0")
            return
        facts = checkpoint.read_facts(self.found)
        if facts["vocabulary"] != self.data.vocabulary.hash:
            raise DataError(f"{self.found}: was trained with another vocabulary than {self.cfg.vocabulary}")
        if "stream" in facts:  # not in a checkpoint of before this was recorded
            self.stream.step_of(facts["stream"])
        checkpoint.load(self.found, module.bert, module.engine.optimizer)
        self.step = facts["step"]
        self.guard.restore(facts.get("guard", self.guard.state()))
        self.held_out_loss = facts.get("held_out_loss", math.nan)
        module.engine.scheduler.step(self.step)
        self._tell_lightning(module)
        self.screen.line(f"resuming at step {self.step} from {self.found}")

    def _facts(self) -> dict:
        """Return what a checkpoint says of itself."""
        cfg = self.cfg
        return {
            "network": self.network.to_dict(),
            "precision": cfg.precision,
            "vocabulary": self.data.vocabulary.hash,
            "store": store_record(self.data.store),
            "data": {
                "split": asdict(self.data.settings),
                "choice": choice(cfg.data),
                "masking": OmegaConf.to_container(cfg.data.masking),
                "seed": cfg.seed,
            },
            "ranks": {"world": dist.get_world_size(), "tensor": cfg.parallel.tensor},
            "versions": {"torch": torch.__version__, "megatron-core": megatron.core.__version__},
        }

    def _describe(self, module) -> None:
        size = sum(p.numel() for p in module.bert.parameters())
        parameter = next(module.bert.parameters())
        dropout = self.cfg.model.attention_dropout
        copies, layout = parallel_state.get_data_parallel_world_size(), self.layout
        self.screen.line(
            f"model: {size:,} parameters a rank, {layout.precision}; {copies} data x {layout.tensor} "
            f"tensor{' and sequence' if layout.sequence else ''} parallel on {parameter.device.type}; attention: "
            f"{choose_backend(parameter.device, parameter.dtype, layout.attention)}, dropout {dropout}"
            + ("; compiled" if layout.compiled else "")
            + ("; deterministic" if layout.deterministic else "")
            + (f"; computed twice: {layout.recompute}" if layout.recompute != "none" else "")
        )

    # its batches

    @cached_property
    def stream(self) -> BatchStream:
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

    def _ahead(self, stream: BatchStream, first: int = 0, last: int | None = None) -> Prefetched:
        return stream.prefetched(first, last, threads=self.cfg.data.threads, depth=self.cfg.data.prefetch)

    def _stream(self, *, held_out: bool = False) -> BatchStream:
        return self.data.stream(
            held_out=held_out,
            rank=parallel_state.get_data_parallel_rank(),
            ranks=parallel_state.get_data_parallel_world_size(),
            tensor=self.cfg.parallel.tensor,
        )

    # in each step, before its update

    def accept(self, loss_sum: float, masked: int, grad_norm: float | None) -> bool:
        """Add the step's figures up over all ranks, and say whether to make the update; on all ranks alike."""
        self.overflow = grad_norm is None
        self.sums = self._reduce(loss_sum, masked, math.inf if grad_norm is None else grad_norm)
        loss = self.sums.loss / self.sums.masked
        ratios = self.guard.ratios(loss, math.nan if self.overflow else self.sums.grad_norm)
        reason = self.guard.judge(loss, self.sums.grad_norm, self.overflow)
        self.measure.add(self.sums, ratios, skipped=reason is not None)
        if reason:
            self._tell_skipped(reason, loss)
        return reason is None

    def _reduce(self, loss_sum: float, masked: int, grad_norm: float) -> StepSums:
        """Sum up over all ranks in one go; tensor parallel ranks have the same figures, of which one rank's count."""
        mine = (loss_sum, masked, 0.0, self.measure.tokens, self.measure.cells)
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

    def after_step(self, module, result: StepResult) -> None:
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
            self.saver.save(self.step, {**self.facts, **known, **stood})
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

    def _tell_lightning(self, module) -> None:
        """Set Lightning's count of steps, which it takes from optimizers that it drives itself."""
        module.trainer.fit_loop.epoch_loop.manual_optimization.optim_step_progress.total.completed = self.step

    def _tell(self, module, row: dict[str, float]) -> None:
        figures = f"loss {row['loss']:.3f}, {row['tokens_per_second']:,.0f} tokens/s" if "loss" in row else None
        self.screen.advance(self.step, figures)
        if not row:
            return
        self.metrics.write(row)
        for logger in module.trainer.loggers:
            logger.log_metrics({k: v for k, v in row.items() if k != "step"}, step=self.step)
        if "held_out_loss" in row:
            self.screen.line(
                f"step {self.step}: held-out loss {row['held_out_loss']:.3f} nats (gene frequency "
                f"{self.baselines['frequency']:.3f}, at that rank {self.baselines['rank_frequency']:.3f})"
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
            summary = {"step": self.step, "finished": finished, **self.baselines}
            if finished:
                summary["held_out_loss"] = self.held_out_loss
            (self.out / "summary.json").write_text(json.dumps(summary, indent=1))
        if finished:
            return 0
        again = f"megacell pretrain out={self.out} resume=true"
        self.screen.line(f"stopped by a signal at step {self.step}, after a save; to go on: {again}")
        return launch.INTERRUPTED
