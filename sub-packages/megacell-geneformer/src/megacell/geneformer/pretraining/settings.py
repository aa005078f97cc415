# SPDX-License-Identifier: Apache-2.0
"""Geneformer's part of a run's settings: the network, cells, split and masking, checked before anything starts."""

from omegaconf import DictConfig

from megacell.geneformer.model.config import ModelConfig

ORDERS = ("shuffled", "blocks")


def model_config(cfg: DictConfig, vocabulary_size: int) -> ModelConfig:
    """Return the network that the settings describe, for a vocabulary of this size."""
    return ModelConfig.of({**dict(cfg.model), "vocabulary_size": vocabulary_size})
