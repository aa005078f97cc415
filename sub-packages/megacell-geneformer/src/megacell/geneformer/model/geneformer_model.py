# SPDX-License-Identifier: Apache-2.0
"""A Geneformer under NeMo: holds the network and its vocabulary, saves and restores them. It does not train."""

from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state
from nemo.core import ModelPT
from nemo.utils.app_state import AppState
from omegaconf import DictConfig

from megacell.core.errors import UsageError
from megacell.geneformer.model.bert import PackedBert
from megacell.geneformer.model.config import ModelConfig
from megacell.geneformer.model.tensor_shapes import shapes_of
from megacell.geneformer.vocabulary.vocabulary import Vocabulary
from megacell.training.distributed import device
from megacell.training.interchange.nemo import WEIGHTS, NemoArchive
from megacell.training.interchange.tensors import check_tensors
from megacell.training.nn.layout import Layout
from megacell.training.nn.weights import copy_whole

VOCABULARY = "vocabulary"  # folder of an archive
TARGET = "nemo.core.classes.modelPT.ModelPT"  # NeMo 3 refuses a .nemo whose target lies outside its own packages


class GeneformerArchive(NemoArchive):
    """A .nemo file with the vocabulary inside."""

    parts = (WEIGHTS, VOCABULARY)

    def save_parts(self, model: "GeneformerModel", folder: Path) -> None:
        """Write the vocabulary."""
        model.vocabulary.save(folder / VOCABULARY)


class GeneformerModel(ModelPT):
    """A Geneformer, built at once, its weights still to be filled.

    Parameters
    ----------
    cfg : DictConfig
        ``network`` (the sizes of ``ModelConfig``), ``precision``.
    trainer : lightning.pytorch.Trainer, optional
        NeMo hands one over when it restores; it has no use here.

    Attributes
    ----------
    sizes : ModelConfig
    bert : PackedBert
    vocabulary : Vocabulary
        Set by who fills the weights; not there before.
    """

    vocabulary: Vocabulary

    def __init__(self, cfg: DictConfig, trainer: Any = None):
        super().__init__(DictConfig({**dict(cfg), "target": TARGET}), trainer)
        self.sizes = ModelConfig.of(dict(cfg.network))
        if self._is_model_being_restored():
            self.vocabulary = Vocabulary.open(Path(AppState().nemo_file_folder) / VOCABULARY)
        with device.single_process():
            tensor = parallel_state.get_tensor_model_parallel_world_size()
            self.bert = PackedBert(self.sizes, Layout(tensor=tensor, precision=self.cfg.precision))

    def load_state_dict(self, state_dict, strict: bool = True, assign: bool = False):
        """Take whole weights, or of them what belongs to this rank where tensor parallel groups stand.

        DataError for weights of which a part would not be this network's: torch cannot tell.
        """
        if self.bert.tp_group.size() == 1:
            return super().load_state_dict(state_dict, strict, assign)
        weights = {name.removeprefix("bert."): whole for name, whole in state_dict.items()}
        check_tensors(weights, shapes_of(self.sizes, self.sizes.padded_vocabulary), "the weights", "configuration")
        return copy_whole(self.bert, weights.items())

    def weights(self) -> dict[str, torch.Tensor]:
        """Return the whole weights on the CPU, by name; UsageError for a model that is cut over several ranks."""
        if self.bert.tp_group.size() > 1:
            raise UsageError("each rank has a part of this model only: export its run, or restore it in one process")
        return {k: v.cpu() for k, v in self.state_dict().items() if isinstance(v, torch.Tensor)}

    def save_to(self, save_path: str) -> None:
        """Write a .nemo file."""
        self._save_restore_connector = GeneformerArchive()
        super().save_to(save_path)

    @classmethod
    def restore_from(cls, restore_path: str, *args, save_restore_connector=None, **kwargs) -> "GeneformerModel":
        """Restore a .nemo file, as NeMo's ``ModelPT.restore_from``, with its vocabulary.

        Where Megatron's tensor parallel groups stand each rank gets its part, else this one process gets it whole.
        """
        GeneformerArchive.check(Path(restore_path))
        with device.single_process():
            return super().restore_from(
                restore_path, *args, save_restore_connector=save_restore_connector or GeneformerArchive(), **kwargs
            )

    def configure_optimizers(self) -> None:
        """Nothing here: `megacell.training` trains."""

    def setup_training_data(self, train_data_config) -> None:
        """Nothing here: a model brings no data."""

    def setup_validation_data(self, val_data_config) -> None:
        """Nothing here: a model brings no data."""

    @classmethod
    def list_available_models(cls):
        """Return None: weights come from runs and files."""
        return None
