# SPDX-License-Identifier: Apache-2.0
"""The entry of `megacell pretrain`: settings → processes → NeMo's and Lightning's trainer → steps → checkpoints."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig

from megacell.core import lock
from megacell.core.errors import UsageError
from megacell.training.config import settings
from megacell.training.distributed import device, launch, slurm
from megacell.training.family import find_family
from megacell.training.nn.attention_backends import check_backend
from megacell.training.nn.fusion import check_compiler
from megacell.training.run import loggers


def main(overrides: list[str]) -> int:
    """Run ``megacell pretrain``; returns its exit code: 0, or 75 if a signal ended it after a save."""
    cfg = settings.compose(overrides)
    check_paths(cfg)
    loggers.check(cfg)
    launcher, nodes = cfg.launcher, cfg.launcher.get("nodes", 1)
    if launch.started_by_launcher():
        settings.check_ranks(cfg, launch.world_size(cfg.devices))
        check_machine(cfg)
        return train(cfg)
    settings.check_ranks(cfg, nodes * cfg.devices)
    if launcher.kind == "srun":
        return slurm.submit(cfg, overrides)
    check_machine(cfg)
    if launcher.kind == "torchrun":
        return launch.launch(cfg.devices, overrides, launcher)
    if cfg.devices > 1:
        return launch.launch(cfg.devices, overrides)
    return train(cfg)


def check_paths(cfg: DictConfig) -> None:
    """Refuse, before anything starts, inputs that are not there and a run folder that holds something."""
    for name in find_family(cfg.family).inputs:
        if not Path(cfg[name]).is_dir():
            raise UsageError(f"{name}={cfg[name]}: no such folder")
    if launch.is_first():
        _check_folder(cfg)


def _check_folder(cfg: DictConfig) -> None:
    """Refuse a run folder that holds more than the lock of a start that was killed."""
    out = Path(cfg.out)
    if not cfg.resume and out.exists() and any(not entry.name.startswith(lock.NAME) for entry in out.iterdir()):
        raise UsageError(f"{out} exists: add resume=true to go on with it, or choose another out=")


@contextlib.contextmanager
def only_one(cfg: DictConfig) -> Iterator[None]:
    """Hold the run folder's lock, on the first rank for all; a folder in which nothing came to be is taken away again.

    Raises
    ------
    DataError
        Another process trains in the folder.
    """
    out = Path(cfg.out)
    if not launch.is_first():
        yield
        return
    there = out.exists()
    out.mkdir(parents=True, exist_ok=True)
    try:
        with lock.held(out / lock.NAME, f"{out}: another process is training in this folder"):
            _check_folder(cfg)  # again: another one may have come between
            yield
    finally:
        if not there and not any(out.iterdir()):
            out.rmdir()


def check_machine(cfg: DictConfig) -> None:
    """Refuse, before anything starts, what cannot run on this machine."""
    check_backend(cfg.attention, cfg.precision)
    if cfg.compile:
        check_compiler()


def train(cfg: DictConfig) -> int:
    """Train on this rank."""
    with only_one(cfg):
        return _train(cfg)


def _train(cfg: DictConfig) -> int:
    device.quiet()
    import lightning.pytorch as pl
    from nemo.utils.exp_manager import exp_manager

    from megacell.training.distributed.strategy import MegatronStrategy
    from megacell.training.run.module import TrainingModule
    from megacell.training.run.run import Run

    run = Run(cfg)
    gpu = torch.cuda.is_available()
    ranks, local = launch.world_size(cfg.devices), launch.local_size(cfg.devices)
    trainer = pl.Trainer(
        max_steps=cfg.steps,
        accelerator="gpu" if gpu else "cpu",
        devices=local,
        num_nodes=ranks // local,
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
            **loggers.options(cfg, first=run.first),
            "create_checkpoint_callback": False,
            "create_preemption_callback": False,
            "resume_if_exists": False,
            "log_step_timing": False,
            "seconds_to_sleep": 0,
        },
    )
    loggers.tell_options(cfg, trainer)
    module = TrainingModule(trainer, run)
    try:
        with device.deterministic(cfg.deterministic):
            trainer.fit(module)
    finally:
        run.close()
    return run.finish()


def _cluster() -> list[Any]:
    """Return Lightning's view of what started the ranks; under srun without its own requeueing."""
    from lightning.pytorch.plugins.environments import SLURMEnvironment, TorchElasticEnvironment

    if TorchElasticEnvironment.detect():  # also inside of a Slurm job, whose one task may have started them
        return [TorchElasticEnvironment()]
    return [SLURMEnvironment(auto_requeue=False)] if SLURMEnvironment.detect() else []
