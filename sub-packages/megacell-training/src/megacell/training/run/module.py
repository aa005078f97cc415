# SPDX-License-Identifier: Apache-2.0
"""A run under NeMo: a ModelPT whose training step is one optimizer step over a list of micro-batches."""

import time
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from nemo.core import ModelPT
from omegaconf import DictConfig

from megacell.training.distributed import device
from megacell.training.engine import Engine
from megacell.training.family import MicroBatch
from megacell.training.run.run import Run


class TrainingModule(ModelPT):
    """The network of a run's family; built when training sets it up, since the process groups have to stand first.

    Parameters
    ----------
    trainer : lightning.pytorch.Trainer
    run : Run
        Data, checkpoints and metrics.
    """

    def __init__(self, trainer: Any, run: Run):
        super().__init__(DictConfig({}), trainer)
        self.automatic_optimization = False
        self.run = run
        self.network: Any = None
        self.engine: Any = None

    def build(self) -> None:
        """Make the network on this rank, with its initial weights."""
        if self.network is None:
            self.network = self.run.family_run.build(self.run.layout)
            self.run.family_run.fill(self.network)

    def make_engine(self) -> None:
        """Put the network under Megatron's DDP and optimizer; called when it lies on its device."""
        self.engine = Engine(self.run.cfg, self.network)

    def ready(self) -> None:
        """Let the run begin; called once DDP and the optimizer stand."""
        self.run.begin(self)

    def on_train_start(self) -> None:
        """Take over the signals, after Lightning has: it would end the run at SIGTERM without a save."""
        self.run.signals.watch()

    def train_dataloader(self) -> Iterator[list[MicroBatch]]:
        """Return this rank's steps that are still to be done."""
        return self.run.steps()

    def transfer_batch_to_device(self, batch: list[MicroBatch], where: torch.device, dataloader_idx: int) -> list[Any]:
        """Move the micro-batches of a step."""
        self.run.measure.start_step(batch)
        return [self.run.family_run.pack(micro_batch, where) for micro_batch in batch]

    def training_step(self, packs: list[Any], index: int) -> None:
        """One optimizer step, and what the run does after it."""
        device.seed_step(self.run.cfg.seed, self.run.step)
        start = time.perf_counter()
        result = self.engine.train_step(packs, self.run.accept)
        seconds = time.perf_counter() - start  # its figures were waited for: a GPU is done, too
        self.run.measure.engine_seconds += seconds
        self.run.after_step(self, result)

    @torch.no_grad()
    def held_out_loss(self) -> tuple[float, int]:
        """Return the mean loss over the held-out cells' items, and their number; over all ranks."""
        self.network.eval()
        sums = torch.zeros(2, dtype=torch.float64, device=self.device)
        for batch in self.run.held_out():
            packs = [self.run.family_run.pack(micro_batch, self.device) for micro_batch in batch]
            if packs:
                sums += torch.tensor(self.engine.forward_backward(packs, forward_only=True), device=self.device)
        self.network.train()
        dist.all_reduce(sums, group=parallel_state.get_data_parallel_group())
        return float(sums[0] / sums[1]), int(sums[1])

    def configure_optimizers(self) -> None:
        """Nothing here: the strategy makes Megatron's optimizer once its DDP stands."""

    def setup_training_data(self, train_data_config: Any) -> None:
        """Nothing here: a run brings its data."""

    def setup_validation_data(self, val_data_config: Any) -> None:
        """Nothing here: a run brings its data."""

    @classmethod
    def list_available_models(cls) -> None:
        """Return None: weights come from runs and files."""
        return None
