# SPDX-License-Identifier: Apache-2.0
"""The smallest family: made-up numbers, a stream of them that is a function of the step, and a regression."""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import DictConfig

from megacell.core.errors import DataError, UsageError
from megacell.store.sampling.prefetched import Prefetched
from megacell.training.family import About, Baselines
from megacell.training.nn.layout import Layout

HELD_OUT = 4  # steps


@dataclass
class Batch:
    """Samples as numpy has them; see `megacell.training.family.MicroBatch`."""

    cells: np.ndarray
    values: np.ndarray
    sample: np.ndarray
    targets: np.ndarray

    @property
    def n_tokens(self) -> int:
        """Values."""
        return len(self.values)

    @property
    def n_items(self) -> int:
        """Samples, each of which has a loss."""
        return len(self.targets)


class ToyStream:
    """Steps of made-up samples, dealt to the ranks in turn, a micro-batch for each half."""

    def __init__(self, cfg: DictConfig, rank: int, ranks: int, held_out: bool):
        self.cfg, self.rank, self.ranks, self.held_out = cfg, rank, ranks, held_out

    def step(self, k: int) -> list[Batch]:
        """Return the micro-batches of a step."""
        time.sleep(0 if self.held_out else self.cfg.data.delay)
        first = k * self.cfg.batch.cells + (1 << 20 if self.held_out else 0)
        mine = np.arange(first, first + self.cfg.batch.cells)[self.rank :: self.ranks]
        return [self._batch(part, k) for part in np.array_split(mine, 2) if len(part)]

    def _batch(self, cells: np.ndarray, k: int) -> Batch:
        draws = [np.random.default_rng([self.cfg.seed, cell]) for cell in cells]
        parts = [draw.normal(size=(draw.integers(1, 9), self.cfg.data.features)).astype(np.float32) for draw in draws]
        targets = np.array([np.abs(part).sum() for part in parts], np.float32)
        if not self.held_out and k + 1 == self.cfg.data.spike_at:
            targets *= 1e6
        return Batch(cells, np.concatenate(parts), np.repeat(np.arange(len(parts)), [len(p) for p in parts]), targets)

    def prefetched(self, first: int, last: int | None = None, *, threads: int, depth: int) -> Prefetched[list[Batch]]:
        """Return steps made ahead."""
        return Prefetched(self.step, first, HELD_OUT if self.held_out else last, threads=threads, depth=depth)

    def state_dict(self, step: int) -> dict[str, int | str]:
        """Return what tells this stream from others."""
        return {"step": step, "seed": self.cfg.seed}

    def step_of(self, state: dict[str, int | str]) -> int:
        """Return the step."""
        if state["seed"] != self.cfg.seed:
            raise UsageError(f"the state was kept with seed {state['seed']}, here it is {self.cfg.seed}")
        return int(state["step"])


class ToyRun:
    """See `megacell.training.family.FamilyRun`."""

    unit = "squared units"
    digest = "5eed"

    def __init__(self, cfg: DictConfig):
        self.cfg = cfg
        self.lines = [f"made-up numbers of {cfg.data.features} features"]

    def stream(self, *, held_out: bool = False, rank: int = 0, ranks: int = 1, tensor: int = 1) -> ToyStream:
        """Return a rank's steps."""
        return ToyStream(self.cfg, rank, ranks, held_out)

    def build(self, layout: Layout) -> Any:
        """Return the network."""
        from toy_network import ToyNetwork  # imports torch and Megatron

        return ToyNetwork(self.cfg.data.features, self.cfg.model.hidden, self.cfg.model.dropout, layout)

    def fill(self, network: Any) -> None:
        """Draw the weights."""
        from megacell.training.nn.weights import initialise

        initialise(network, self.cfg.seed, 0.1)

    def pack(self, batch: Batch, device: Any) -> Any:
        """Move a micro-batch."""
        import torch
        from toy_network import Samples

        return Samples(*(torch.from_numpy(x).to(device) for x in (batch.values, batch.sample, batch.targets)))

    def describe(self, network: Any) -> str:
        """Return the dropout."""
        return f"dropout {network.config.hidden_dropout}"

    def facts(self) -> dict[str, Any]:
        """Return the sizes."""
        return {"network": dict(self.cfg.model)}

    def check_facts(self, facts: Mapping[str, Any], checkpoint: Path) -> None:
        """Raise DataError for other sizes."""
        if facts["network"] != dict(self.cfg.model):
            raise DataError(f"{checkpoint}: is of another network")

    def write_inputs(self, out: Path) -> None:
        """Write what a family may keep."""
        (out / "inputs.txt").write_text("made up\n")

    def about(self, out: Path) -> About:
        """Return a line of each kind."""
        return About([("look at it", f"ls {out}")], [("inputs.txt", "where the numbers come from")], "Made-up numbers.")

    def baselines(self, out: Path) -> Baselines:
        """Return the loss of predicting nothing."""
        stream = self.stream(held_out=True)
        targets = np.concatenate([batch.targets for k in range(HELD_OUT) for batch in stream.step(k)])
        loss = float(np.square(targets).mean())
        return Baselines({"zero": loss}, f"predicting zero: {loss:.3f}", f"zero {loss:.3f}")


class Toy:
    """See `megacell.training.family.ModelFamily`."""

    name = "toy"
    configs = Path(__file__).parent / "configs"
    inputs = ()

    def check(self, cfg: DictConfig) -> None:
        """Raise UsageError for a width that ranks cannot share."""
        if cfg.model.hidden % cfg.parallel.tensor:
            raise UsageError(f"model.hidden={cfg.model.hidden}: must divide into parallel.tensor")

    def open(self, cfg: DictConfig, facts: Mapping[str, Any] | None) -> ToyRun:
        """Open nothing."""
        return ToyRun(cfg)


TOY = Toy()
