# SPDX-License-Identifier: Apache-2.0
"""Where a run's figures go beside metrics.csv: TensorBoard's files, and Weights & Biases where it is asked for."""

import importlib.util
import os
import re
import secrets
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from megacell.core.errors import DataError, UsageError

_ID = "wandb-id"  # in the run folder: a run that goes on is the same run there
_WANDB = ("project", "entity", "name", "tags")
_AWAY = ("offline", "disabled", "dryrun")


def check(cfg: DictConfig) -> None:
    """Raise UsageError, before anything starts, where Weights & Biases is asked for and cannot be had."""
    if not cfg.logger.wandb:
        return
    if odd := [str(name) for name in cfg.logger.wandb if name not in _WANDB]:  # of a run's config.yaml, perhaps
        raise UsageError(f"logger.wandb.{odd[0]}: no option here; there are {', '.join(_WANDB)}")
    if importlib.util.find_spec("wandb") is None:
        raise UsageError("logger=wandb: wandb is not installed; pip install wandb, or leave logger=wandb out")
    if os.environ.get("WANDB_MODE") in _AWAY:
        return
    import wandb

    if not wandb.api.api_key:
        raise UsageError("logger=wandb: not logged in; type wandb login, or set WANDB_MODE=offline")


def options(cfg: DictConfig, *, first: bool) -> dict[str, Any]:
    """Return what NeMo's exp_manager has to be told of loggers; `first`: on rank 0, which alone writes."""
    found: dict[str, Any] = {"create_tensorboard_logger": cfg.logger.tensorboard}
    if cfg.logger.wandb:
        run = Path(cfg.out)
        own = {"name": cfg.logger.wandb.name or run.name, "id": _id(run) if first else None}
        found |= {"create_wandb_logger": True, "wandb_logger_kwargs": {**cfg.logger.wandb, **own}}
    return found


def tell_options(cfg: DictConfig, trainer: Any) -> None:
    """Give Weights & Biases the run's options; exp_manager would hand them on in a form that it cannot take."""
    from lightning.pytorch.loggers import WandbLogger

    for logger in trainer.loggers:
        if isinstance(logger, WandbLogger):
            logger.log_hyperparams(OmegaConf.to_container(cfg))


def _id(run: Path) -> str:
    path = run / _ID
    if not path.exists():
        path.write_text(secrets.token_hex(8))
    if not re.fullmatch("[0-9a-f]{16}", found := path.read_text()[:80]):
        raise DataError(f"{path}: not what a run writes there; remove it, for the run to be a new one there")
    return found
