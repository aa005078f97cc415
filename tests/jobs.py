# SPDX-License-Identifier: Apache-2.0
"""What the tests run inside a pool's ranks."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np

NETWORK = {
    "layers": 2, "hidden": 32, "ffn": 64, "heads": 4, "max_length": 64, "vocabulary_size": 100,
    "norm": "pre", "activation": "gelu", "tied_head": True, "hidden_dropout": 0.0, "attention_dropout": 0.0,
    "layernorm_epsilon": 1e-12, "init_std": 0.02, "scaled_init": True,
}  # fmt: skip
OPTIONS = {
    "steps": 20, "precision": "fp32",
    "optim": {"lr": 3e-3, "min_lr": 0.0, "schedule": "cosine", "warmup": 2, "weight_decay": 0.01, "beta1": 0.9,
              "beta2": 0.999, "eps": 1e-8, "clip": 1.0},
}  # fmt: skip
CELLS = 12  # of a step


@contextlib.contextmanager
def groups(tensor: int) -> Iterator[None]:
    """Megatron's process groups for one job."""
    from megacell.geneformer.training import device

    with device.megatron():
        from megatron.core import parallel_state

        parallel_state.initialize_model_parallel(tensor_model_parallel_size=tensor)
        try:
            yield
        finally:
            parallel_state.destroy_model_parallel()


def packs(step: int, rank: int, ranks: int, micro_batches: int = 2) -> list:
    """Return rank's share of a made-up step: cells of 5 to 60 tokens, cut into micro-batches."""
    import torch

    from megacell.geneformer.model.bert import Pack

    draw = np.random.default_rng(step)
    cells = [draw.integers(4, NETWORK["vocabulary_size"], size=draw.integers(5, 60)) for _ in range(CELLS)]
    chosen = [np.sort(draw.choice(len(cell), size=max(1, len(cell) // 6), replace=False)) for cell in cells]
    mine = range(rank, CELLS, ranks)
    made = []
    for part in np.array_split(np.array(mine), micro_batches):
        starts = np.concatenate([[0], np.cumsum([len(cells[c]) for c in part])])
        masked = np.concatenate([chosen[c] + start for c, start in zip(part, starts, strict=False)])
        tokens = np.concatenate([cells[c] for c in part])
        shown = tokens.copy()
        shown[masked] = 1
        positions = np.concatenate([np.arange(len(cells[c])) for c in part])
        made.append(
            Pack(*map(torch.from_numpy, (shown, positions, starts.astype(np.int32))), int(np.diff(starts).max()),
                 *map(torch.from_numpy, (masked, tokens[masked])))
        )  # fmt: skip
    return made


def make_engine(dropout: float = 0.0, precision: str = "fp32"):
    """Return an engine over a small network with its initial weights; the process groups stand."""
    from megatron.core import parallel_state
    from omegaconf import OmegaConf

    from megacell.geneformer.model.bert import PackedBert
    from megacell.geneformer.model.config import ModelConfig
    from megacell.geneformer.model.init import initialise
    from megacell.geneformer.training.engine import Engine

    network = ModelConfig(**{**NETWORK, "hidden_dropout": dropout, "attention_dropout": dropout})
    tensor = parallel_state.get_tensor_model_parallel_world_size()
    bert = PackedBert(network, tensor_parallel_size=tensor, precision=precision)
    initialise(bert, network, seed=7)
    return Engine(OmegaConf.create({**OPTIONS, "precision": precision}), bert)


def whole_gradients(engine) -> dict[str, np.ndarray]:
    """Return every parameter's reduced gradient, put together from data parallel shards and tensor parallel parts."""
    import torch
    import torch.distributed as dist
    from megatron.core import parallel_state as state

    for buffer in (*engine.ddp.buffers, *engine.ddp.expert_parallel_buffers):
        for bucket in buffer.buckets:
            shards = list(bucket.grad_data.chunk(state.get_data_parallel_world_size()))
            own = shards[state.get_data_parallel_rank()].clone()
            dist.all_gather(shards, own, group=state.get_data_parallel_group())
    found = {}
    for name, parameter in engine.bert.named_parameters():
        gradient = parameter.main_grad.detach().clone()
        if getattr(parameter, "tensor_model_parallel", False):
            parts = [torch.empty_like(gradient) for _ in range(state.get_tensor_model_parallel_world_size())]
            dist.all_gather(parts, gradient, group=state.get_tensor_model_parallel_group())
            gradient = torch.cat(parts, dim=parameter.partition_dim)
        found[name] = gradient.numpy()
    return found


def losses_and_gradients(tensor: int, steps: int = 20) -> tuple[list[float], list[dict[str, np.ndarray]]]:
    """Train without dropout; return each step's mean loss over all ranks and its reduced gradients."""
    import torch
    import torch.distributed as dist

    with groups(tensor):
        from megatron.core import parallel_state as state

        engine = make_engine()
        losses, gradients = [], []
        step_optimizer = engine.optimizer.step
        engine.optimizer.step = lambda: (gradients.append(whole_gradients(engine)), step_optimizer())[1]
        for step in range(steps):
            result = engine.train_step(
                packs(step, state.get_data_parallel_rank(), state.get_data_parallel_world_size())
            )
            sums = torch.tensor([result.loss_sum, result.masked], dtype=torch.float64)
            dist.all_reduce(sums, group=state.get_data_parallel_group())
            losses.append(float(sums[0] / sums[1]))
        return losses, gradients


def train_with_dropout(
    tensor: int, steps: int, folder: str | None = None, save_at: int | None = None, load: str | None = None
) -> list[float]:
    """Train with dropout, from the start or from a checkpoint, saving one on the way; return this rank's loss sums."""
    from megacell.geneformer.training import checkpoint, device

    with groups(tensor):
        from megatron.core import parallel_state as state

        engine, losses, first = make_engine(dropout=0.1), [], 0
        if load:
            first = checkpoint.load(Path(load), engine.bert, engine.optimizer)["step"]
            engine.scheduler.step(first)
        for step in range(first, steps):
            device.seed_step(0, step)
            rank, ranks = state.get_data_parallel_rank(), state.get_data_parallel_world_size()
            losses.append(engine.train_step(packs(step, rank, ranks)).loss_sum)
            if step + 1 == save_at:
                checkpoint.save(Path(folder), save_at, engine.bert, engine.optimizer, {}, keep=2)
        return losses
