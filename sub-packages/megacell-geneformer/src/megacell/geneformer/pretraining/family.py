# SPDX-License-Identifier: Apache-2.0
"""Geneformer as a family that `megacell.training` trains; found by the entry-point group `megacell.families`."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig

from megacell.geneformer.pretraining import settings

if TYPE_CHECKING:
    from megacell.geneformer.pretraining.geneformer_run import GeneformerRun


class Geneformer:
    """The family; see `megacell.training.family.ModelFamily`."""

    name = "geneformer"
    configs = Path(__file__).resolve().parents[1] / "configs"
    inputs = ("store", "vocabulary")

    def check(self, cfg: DictConfig) -> None:
        """Raise UsageError for options that cannot be used."""
        settings.check(cfg)

    def open(self, cfg: DictConfig, facts: Mapping[str, Any] | None) -> "GeneformerRun":
        """Open store and vocabulary."""
        from megacell.geneformer.pretraining.geneformer_run import GeneformerRun  # imports torch and Megatron

        return GeneformerRun(cfg, facts)


GENEFORMER = Geneformer()
