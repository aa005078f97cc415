# SPDX-License-Identifier: Apache-2.0
"""Geneformer's part of a run's settings: the network, cells, split and masking, checked before anything starts."""

from omegaconf import DictConfig, ListConfig

from megacell.core.errors import UsageError
from megacell.geneformer.model.config import ModelConfig
from megacell.geneformer.tokens.masking import MaskSettings
from megacell.store.sampling.split import SplitSettings
from megacell.training.config.settings import check_positive

ORDERS = ("shuffled", "blocks")


def check(cfg: DictConfig) -> None:
    """Raise UsageError for options of network, cells and masks that cannot be used, or do not fit each other."""
    check_positive(cfg, ("data.block", "data.blocks"))
    _check_data(cfg.data)
    model = model_config(cfg, vocabulary_size=1)
    model.check_parallel(cfg.parallel.tensor)
    if cfg.batch.tokens < model.max_length:
        raise UsageError(f"batch.tokens={cfg.batch.tokens}: must be at least model.max_length={model.max_length}")


def _check_data(data: DictConfig) -> None:
    """Check the options of cells, split and masks, as far as they can be without the store."""
    if data.order not in ORDERS:
        raise UsageError(f"data.order={data.order}: choose one of {', '.join(ORDERS)}")
    if data.balance is not None and data.order != "shuffled":
        raise UsageError(f"data.balance={data.balance}: draws cells one by one; leave data.order={data.order} out")
    for name in ("where", "balance"):
        if not isinstance(data[name], str | None):
            raise UsageError(f"data.{name}: must be a text, or null")
    if not isinstance(data.split.by, str | None):
        raise UsageError("data.split.by: must be a text, or null")
    if data.exclude is not None:
        if not isinstance(data.exclude, DictConfig):
            raise UsageError(
                f"data.exclude={data.exclude}: give values by column, data.exclude={{tissue:[blood,lung]}}"
            )
        for column, values in data.exclude.items():
            data.exclude[column] = values if isinstance(values, ListConfig) else [values]
    for group in ("masking", "split"):
        for name, value in data[group].items():
            if name != "by" and value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
                raise UsageError(f"data.{group}.{name}={value}: must be a number")
    MaskSettings(**data.masking)
    SplitSettings(**{name: value for name, value in data.split.items() if value is not None})


def model_config(cfg: DictConfig, vocabulary_size: int) -> ModelConfig:
    """Return the network that the settings describe, for a vocabulary of this size."""
    return ModelConfig.of({**dict(cfg.model), "vocabulary_size": vocabulary_size})
