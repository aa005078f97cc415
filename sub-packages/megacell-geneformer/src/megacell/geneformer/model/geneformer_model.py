# SPDX-License-Identifier: Apache-2.0
"""A Geneformer under NeMo: holds the network and its vocabulary, saves and restores them. It does not train."""

from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state
from nemo.core import ModelPT
from omegaconf import DictConfig, OmegaConf

from megacell.core.errors import UsageError
from megacell.geneformer.model.archive import GeneformerArchive, read_own
from megacell.geneformer.model.bert import PackedBert
from megacell.geneformer.model.config import ModelConfig
from megacell.geneformer.model.tensor_shapes import shapes_of
from megacell.geneformer.vocabulary.vocabulary import Vocabulary
from megacell.training.distributed import device
from megacell.training.interchange.nemo import config_of
from megacell.training.interchange.safe_archive import open_archive
from megacell.training.interchange.tensors import Weights, check_tensors
from megacell.training.nn.layout import Layout
from megacell.training.nn.weights import copy_whole

TARGET = "nemo.core.classes.modelPT.ModelPT"  # NeMo 3 refuses a .nemo whose target lies outside its own packages


class GeneformerModel(ModelPT):
    """A Geneformer, built at once, its weights still to be filled.

    Parameters
    ----------
    cfg : DictConfig
        ``network`` (the sizes of ``ModelConfig``), ``precision``.
    trainer : lightning.pytorch.Trainer, optional
        For NeMo's `ModelPT`; it has no use here.

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
    def filled(cls, cfg: dict[str, Any], weights: Weights, vocabulary: Vocabulary, trainer: Any = None):
        """Return the network that a configuration describes, filled with whole weights, or of them this rank's part."""
        model = cls(OmegaConf.create(cfg), trainer)
        with device.single_process():
            copy_whole(model.bert, weights)
        model.vocabulary = vocabulary
        return model

    @classmethod
    def restore_from(
        cls, restore_path: str, override_config_path=None, map_location=None, strict: bool = True,
        return_config: bool = False, save_restore_connector=None, trainer: Any = None, **_: Any,
    ):  # fmt: skip
        """Restore a .nemo file of Megacell's, as NeMo's ``ModelPT.restore_from``, with its vocabulary.

        It is read as by `open_model`, with all its checks, before a network is built. Where Megatron's tensor parallel
        groups stand each rank gets its part, else this one process gets it whole.

        Parameters
        ----------
        restore_path : str
        map_location : torch.device, optional
            The GPU where there is one by default.
        return_config : bool, default False
            Return the configuration only.
        trainer : lightning.pytorch.Trainer, optional
        override_config_path, save_restore_connector, strict
            NeMo's; a Geneformer is read with its own configuration, all of it.

        Raises
        ------
        UsageError
            Another configuration, or another way of reading.
        DataError
            As `open_model`.
        """
        if override_config_path is not None or save_restore_connector is not None:
            raise UsageError("restore_from: leave override_config_path and save_restore_connector out")
        path = Path(restore_path)
        with open_archive(path) as archive:
            cfg, weights, vocabulary = read_own(archive, config_of(archive, path), path)
        if return_config:
            return OmegaConf.create(cfg)
        return cls.filled(cfg, iter(weights.items()), vocabulary, trainer).to(map_location or device.device())

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
