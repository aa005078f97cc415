# SPDX-License-Identifier: Apache-2.0
"""The entry of `megacell pretrain`: settings → processes → NeMo's and Lightning's trainer → steps → checkpoints."""

import json
import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import asdict
from functools import cached_property
from pathlib import Path

import torch
import torch.distributed as dist
from megacell.geneformer.training import device, launch, settings
from megacell.store.errors import DataError, UsageError
from omegaconf import DictConfig, OmegaConf


def main(overrides: list[str]) -> int:
    """Run ``megacell pretrain``; returns its exit code: 0, or 75 if a signal ended it after a save."""
    cfg = settings.compose(overrides)
    check_out(cfg)
    settings.check_ranks(cfg, launch.world_size(cfg.devices))
    if cfg.devices > 1 and not launch.started_by_launcher():
        return launch.launch(cfg.devices, overrides)
    if launch.started_by_launcher():
        launch.end_with_parent()
    return train(cfg)


def check_out(cfg: DictConfig) -> None:
    """Refuse a run folder that holds something, unless it is one to resume."""
    out = Path(cfg.out)
    if cfg.resume and not (out / settings.SAVED).is_file():
        raise UsageError(f"{out}: no run to resume there; leave resume=true out to start one")
    first = int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0"))) == 0
    if not cfg.resume and first and out.exists() and any(out.iterdir()):
        raise UsageError(f"{out} exists: add resume=true to go on with it, or choose another out=")


def train(cfg: DictConfig) -> int:
    """Train on this rank."""
    device.quiet()
    import lightning.pytorch as pl
    from megacell.geneformer.training.module import GeneformerModel
    from megacell.geneformer.training.strategy import MegatronStrategy
    from nemo.utils.exp_manager import exp_manager

    run = Run(cfg)
    gpu = torch.cuda.is_available()
    local = int(os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("SLURM_NTASKS_PER_NODE", cfg.devices)))
    trainer = pl.Trainer(
        max_steps=cfg.steps,
        accelerator="gpu" if gpu else "cpu",
        devices=local,
        num_nodes=max(1, launch.world_size(cfg.devices) // local),
        strategy=MegatronStrategy(cfg.parallel.tensor, process_group_backend="nccl" if gpu else "gloo"),
        plugins=_cluster(),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        log_every_n_steps=cfg.log_every,
    )
    exp_manager(
        trainer,
        {
            "explicit_log_dir": str(Path(cfg.out).resolve() / "logs"),  # it moves aside what else lies in there
            "create_tensorboard_logger": cfg.logger.tensorboard,
            "create_checkpoint_callback": False,
            "create_preemption_callback": False,
            "resume_if_exists": False,
            "log_step_timing": False,
            "seconds_to_sleep": 0,
        },
    )
    module = GeneformerModel(
        OmegaConf.create({"network": run.network.to_dict(), "precision": cfg.precision}), trainer, run
    )
    trainer.fit(module)
    return run.finish()


def _cluster() -> list:
    """Under srun: Lightning's environment for it, without its own requeueing."""
    from lightning.pytorch.plugins.environments import SLURMEnvironment

    return [SLURMEnvironment(auto_requeue=False)] if SLURMEnvironment.detect() else []


class Run:
    """One training run: its data, folder, step, checkpoints and figures, as the module meets them.

    Attributes
    ----------
    step : int
        Optimizer steps done.

    """

    def __init__(self, cfg: DictConfig):
        from megacell.geneformer.training.checkpoint import Signals
        from megacell.geneformer.training.data import TrainingData
        from megacell.geneformer.training.metrics import Measure, Screen

        self.cfg = cfg
        self.out = Path(cfg.out)
        self.first = int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0"))) == 0
        self.data = TrainingData.open(cfg)
        self.network = settings.model_config(cfg, self.data.vocabulary.size)
        self.step = 0
        self.signals = Signals()
        self.screen = Screen(cfg.steps, shown=self.first)
        self.measure = Measure()
        self.baselines: dict[str, float] = {}
        self.stopped = False
        self.prefetched = None
        if self.first:
            self._make_folder()
        for line in self.data.lines:
            self.screen.line(line)

    def _make_folder(self) -> None:
        """Keep beside the run what it needs to be resumed, exported and understood."""
        self.out.mkdir(parents=True, exist_ok=True)
        if not self.cfg.resume:
            kept = OmegaConf.merge(
                self.cfg, {name: str(Path(self.cfg[name]).resolve()) for name in ("store", "vocabulary")}
            )
            shutil.copytree(self.cfg.vocabulary, self.out / "vocabulary", dirs_exist_ok=True)
            OmegaConf.save(OmegaConf.merge(kept, {"resume": False}), self.out / settings.SAVED)

    @cached_property
    def frequency(self):
        """The frequency baselines, fitted on training cells; the same on every rank."""
        from megacell.geneformer.training.data import fit_frequencies

        return fit_frequencies(self.data, self.cfg.data.baseline_cells)

    def fill(self, bert) -> None:
        """Give the network its initial weights."""
        from megacell.geneformer.baselines import frequency_log_prior
        from megacell.geneformer.model.init import initialise

        if self.cfg.init and not self.cfg.resume:
            from megacell.geneformer.interchange.open import load_into

            load_into(bert, self.network, self.data.vocabulary, Path(self.cfg.init))
            return
        bias = torch.from_numpy(frequency_log_prior(self.frequency)).float() if self.cfg.data.head_bias else None
        initialise(bert, self.network, self.cfg.seed, bias)

    def restore(self, module) -> None:
        """Go on from the newest whole checkpoint; then everything stands and training begins."""
        from megacell.geneformer.training import checkpoint
        from megacell.geneformer.training.data import frequency_losses, save_frequencies
        from megacell.geneformer.training.metrics import MetricsFile

        if self.cfg.resume:
            self._load_newest(module)
        if self.first:
            (self.out / "checkpoints").mkdir(exist_ok=True)
            save_frequencies(self.frequency, self.out / "baselines.npz")
            self.baselines = frequency_losses(self.frequency, self.data)
            self.screen.line(
                f"held-out baselines over {self.baselines['masked_genes']:,} masked genes: gene frequency "
                f"{self.baselines['frequency']:.3f} nats, frequency at that rank {self.baselines['rank_frequency']:.3f}"
            )
            self.metrics = MetricsFile(self.out / "metrics.csv", self.step)
        self.facts = self._facts()
        self.save = lambda: checkpoint.save(
            self.out / "checkpoints",
            self.step,
            module.bert,
            module.engine.optimizer,
            self.facts,
            self.cfg.checkpoint.keep,
        )
        self._describe(module)
        self.signals.watch()
        self.screen.start(self.step)

    def _load_newest(self, module) -> None:
        from megacell.geneformer.training import checkpoint

        path, lines = checkpoint.newest(self.out / "checkpoints")
        for line in lines:
            self.screen.line(line)
        if path is None:
            self.screen.line(f"{self.out}: no whole checkpoint yet: starting from step 0")
            return
        facts = checkpoint.read_facts(path)
        if facts["vocabulary"] != self.data.vocabulary.hash:
            raise DataError(f"{path}: was trained with another vocabulary than {self.cfg.vocabulary}")
        if facts["store"]["digest"] != self.data.store.digest:
            raise DataError(f"{path}: {self.cfg.store} is no longer the store that the run was started on")
        checkpoint.load(path, module.bert, module.engine.optimizer)
        self.step = facts["step"]
        module.engine.scheduler.step(self.step)
        loop = module.trainer.fit_loop.epoch_loop
        loop.manual_optimization.optim_step_progress.total.completed = self.step
        self.screen.line(f"resuming at step {self.step} from {path}")

    def _facts(self) -> dict:
        import megatron.core

        store, cfg = self.data.store, self.cfg
        return {
            "network": self.network.to_dict(),
            "precision": cfg.precision,
            "vocabulary": self.data.vocabulary.hash,
            "store": {
                "path": str(Path(cfg.store).resolve()),
                "generation": store.generation,
                "digest": store.digest,
                "cells": len(store),
            },
            "data": {
                "split": asdict(self.data.settings),
                "masking": OmegaConf.to_container(cfg.data.masking),
                "seed": cfg.seed,
            },
            "ranks": {"world": dist.get_world_size(), "tensor": cfg.parallel.tensor},
            "versions": {"torch": torch.__version__, "megatron-core": megatron.core.__version__},
        }

    def _describe(self, module) -> None:
        from megacell.geneformer.model.attention import choose_backend
        from megatron.core import parallel_state as ranks

        size = sum(p.numel() for p in module.bert.parameters())
        parameter = next(module.bert.parameters())
        dropout = self.cfg.model.attention_dropout
        self.screen.line(
            f"model: {size:,} parameters a rank, {self.cfg.precision}; {ranks.get_data_parallel_world_size()} data x "
            f"{ranks.get_tensor_model_parallel_world_size()} tensor parallel on {module.device.type}; attention: "
            f"{choose_backend(parameter.device, parameter.dtype, dropout)}, dropout {dropout}"
        )

    def _ranks(self) -> dict[str, int]:
        from megatron.core import parallel_state as state

        return {
            "rank": state.get_data_parallel_rank(),
            "ranks": state.get_data_parallel_world_size(),
            "tensor": state.get_tensor_model_parallel_world_size(),
        }

    def steps(self):
        """Yield this rank's micro-batches, a step at a time, from where the run stands."""
        self.stream = self.data.stream(**self._ranks())
        self.prefetched = self.stream.prefetched(self.step, self.cfg.steps, depth=self.cfg.data.prefetch)
        return self.prefetched

    def held_out(self) -> Iterator[list]:
        """Yield this rank's share of the held-out cells."""
        stream = self.data.stream(held_out=True, **self._ranks())
        return (stream.step(k) for k in range(stream.steps_per_epoch))

    def after_step(self, module, result) -> None:
        """Reduce the step's sums, log, validate, save, and stop where a signal asked for it; on all ranks alike."""
        from megacell.geneformer.training.metrics import SUMS
        from megatron.core import parallel_state

        mine = [result.loss_sum, result.masked, self.measure.tokens, self.measure.cells,
                float(self.signals.received is not None)]  # fmt: skip
        totals = torch.tensor(mine, dtype=torch.float64, device=module.device)
        dist.all_reduce(totals, group=parallel_state.get_data_parallel_group())
        sums = dict(zip(SUMS, totals.tolist(), strict=True))
        stop = torch.tensor([sums["stop"]], device=module.device)
        dist.all_reduce(stop, group=parallel_state.get_tensor_model_parallel_group())
        self.stopped = bool(stop.item())
        last = self.step >= self.cfg.steps or self.stopped
        self.measure.add(sums)
        row: dict[str, float] = {}
        if self.step % self.cfg.log_every == 0 or last:
            row = {
                "step": self.step,
                **self.measure.window(self.stream_wait()),
                "grad_norm": result.grad_norm,
                "lr": result.lr,
            }
        paused = time.perf_counter()
        if self.step % self.cfg.validation.every == 0 or self.step >= self.cfg.steps:
            row.setdefault("step", self.step)
            row["held_out_loss"], _ = module.held_out_loss()
        if self.step % self.cfg.checkpoint.every == 0 or last:
            self.save()
        self.measure.pause(time.perf_counter() - paused)
        self._tell(module, row)
        module.trainer.should_stop = module.trainer.should_stop or self.stopped

    def stream_wait(self) -> float:
        """Return the seconds that training has waited for data so far."""
        return self.prefetched.wait_seconds

    def _tell(self, module, row: dict[str, float]) -> None:
        if not self.first:
            return
        self.screen.advance(self.step)
        if not row:
            return
        self.metrics.write(row)
        if module.logger is not None:
            module.logger.log_metrics({k: v for k, v in row.items() if k != "step"}, step=self.step)
        if "loss" in row:
            self.screen.advance(self.step, f"loss {row['loss']:.3f}, {row['tokens_per_second']:,.0f} tokens/s")
        if "held_out_loss" in row:
            self.screen.line(
                f"step {self.step}: held-out loss {row['held_out_loss']:.3f} nats (gene frequency "
                f"{self.baselines['frequency']:.3f}, at that rank {self.baselines['rank_frequency']:.3f})"
            )

    def finish(self) -> int:
        """Close everything; returns the exit code."""
        self.screen.stop()
        self.signals.release()
        if self.first:
            self.metrics.close()
            summary = {"step": self.step, "finished": self.step >= self.cfg.steps, **self.baselines}
            (self.out / "summary.json").write_text(json.dumps(summary, indent=1))
        if self.stopped and self.step < self.cfg.steps:
            self.screen.line(
                f"stopped by a signal at step {self.step}; saved. To go on: megacell pretrain out={self.out} resume=true"
            )
            return launch.INTERRUPTED
        return 0
