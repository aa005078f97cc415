# SPDX-License-Identifier: Apache-2.0
"""The network under NeMo: a ModelPT whose training step is one optimizer step over a list of micro-batches."""

import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from nemo.core import ModelPT
from nemo.utils.app_state import AppState
from omegaconf import DictConfig

from megacell.core.errors import UsageError
from megacell.geneformer.model.config import ModelConfig
from megacell.geneformer.tokens.packing import MicroBatch
from megacell.geneformer.vocabulary.vocabulary import Vocabulary
from megacell.training.distributed import device
from megacell.training.interchange.nemo import NemoArchive
from megacell.training.nn.layout import Layout

TARGET = "nemo.core.classes.modelPT.ModelPT"  # NeMo 3 refuses a .nemo whose target lies outside its own packages


class GeneformerModel(ModelPT):
    """A Geneformer. With a trainer it is built when training sets it up; without one at once, to be used or restored.

    Parameters
    ----------
    cfg : DictConfig
        ``model`` (the sizes of ``ModelConfig``), ``precision``.
    trainer : lightning.pytorch.Trainer, optional
    run : megacell.geneformer.training.run.Run, optional
        What a training run adds: data, checkpoints, metrics.
    """

    def __init__(self, cfg: DictConfig, trainer=None, run=None):
        cfg = DictConfig({**dict(cfg), "target": TARGET})
        super().__init__(cfg, trainer)
        self.automatic_optimization = False
        self.sizes = ModelConfig.of(dict(cfg.network))
        self.bert: Any = None
        self.engine: Any = None
        self.vocabulary = None
        self.run = run
        if trainer is None:
            if self._is_model_being_restored():
                self.vocabulary = Vocabulary.open(Path(AppState().nemo_file_folder) / "vocabulary")
            with device.single_process():
                self.build()

    def build(self) -> None:
        """Make the network on this rank, its weights still to be filled."""
        from megatron.core import parallel_state

        from megacell.geneformer.model.bert import PackedBert

        if self.bert is None:
            tensor = parallel_state.get_tensor_model_parallel_world_size()
            layout = self.run.layout if self.run else Layout(tensor=tensor, precision=self.cfg.precision)
            self.bert = PackedBert(self.sizes, layout)
            if self.run:
                self.run.fill(self.bert)

    def load_state_dict(self, state_dict, strict: bool = True, assign: bool = False):
        """Take whole weights, or of them what belongs to this rank where tensor parallel groups stand.

        DataError for weights of which a part would not be this network's: torch cannot tell.
        """
        from megacell.geneformer.model.tensor_shapes import shapes_of
        from megacell.training.interchange.tensors import check_tensors
        from megacell.training.nn.weights import copy_whole

        if self.bert is None or self.bert.tp_group.size() == 1:
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
        self._save_restore_connector = NemoArchive()
        super().save_to(save_path)

    @classmethod
    def restore_from(cls, restore_path: str, *args, save_restore_connector=None, **kwargs) -> "GeneformerModel":
        """Restore a .nemo file, as NeMo's ``ModelPT.restore_from``, with its vocabulary.

        Where Megatron's tensor parallel groups stand each rank gets its part, else this one process gets it whole.
        """
        from megacell.training.interchange.nemo import check_archive

        check_archive(Path(restore_path))
        with device.single_process():
            return super().restore_from(
                restore_path, *args, save_restore_connector=save_restore_connector or NemoArchive(), **kwargs
            )

    def make_engine(self) -> None:
        """Put the network under Megatron's DDP and optimizer; called when it lies on its device."""
        from megacell.training.engine import Engine

        self.engine = Engine(self.run.cfg, self.bert)

    def ready(self) -> None:
        """Let the run begin; called once DDP and the optimizer stand."""
        self.run.begin(self)

    def on_train_start(self) -> None:
        """Take over the signals, after Lightning has: it would end the run at SIGTERM without a save."""
        self.run.signals.watch()

    def train_dataloader(self):
        """Return this rank's steps that are still to be done."""
        return self.run.steps()

    def transfer_batch_to_device(self, batch: list[MicroBatch], where: torch.device, dataloader_idx: int):
        """Move the micro-batches of a step."""
        from megacell.geneformer.model.bert import Pack

        self.run.measure.start_step(batch)
        return [Pack.of(micro_batch, where) for micro_batch in batch]

    def training_step(self, packs, index: int) -> None:
        """One optimizer step, and what the run does after it."""
        device.seed_step(self.run.cfg.seed, self.run.step)
        start = time.perf_counter()
        result = self.engine.train_step(packs, self.run.accept)
        seconds = time.perf_counter() - start  # its figures were waited for: a GPU is done, too
        self.run.measure.engine_seconds += seconds
        self.run.after_step(self, result)

    @torch.no_grad()
    def held_out_loss(self) -> tuple[float, int]:
        """Return the mean loss in nats over the held-out cells' masked genes, and their number; over all ranks."""
        from megatron.core import parallel_state

        from megacell.geneformer.model.bert import Pack

        self.bert.eval()
        sums = torch.zeros(2, dtype=torch.float64, device=self.device)
        for batch in self.run.held_out():
            packs = [Pack.of(micro_batch, self.device) for micro_batch in batch]
            if packs:
                sums += torch.tensor(self.engine.forward_backward(packs, forward_only=True), device=self.device)
        self.bert.train()
        dist.all_reduce(sums, group=parallel_state.get_data_parallel_group())
        return float(sums[0] / sums[1]), int(sums[1])

    def configure_optimizers(self) -> None:
        """Nothing here: the strategy makes Megatron's optimizer once its DDP stands."""

    def setup_training_data(self, train_data_config) -> None:
        """Nothing here: a run brings its data."""

    def setup_validation_data(self, val_data_config) -> None:
        """Nothing here: a run brings its data."""

    @classmethod
    def list_available_models(cls):
        """Return None: weights come from runs and files."""
        return None
