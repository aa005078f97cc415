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
    "steps": 20, "parallel": {"reduce_fp32": True},
    "optim": {"lr": 3e-3, "min_lr": 0.0, "schedule": "cosine", "warmup": 2, "hold": 0, "weight_decay": 0.01,
              "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "clip": 1.0, "initial_loss_scale": 1024,
              "loss_scale_window": 1000},
}  # fmt: skip
CELLS = 12  # of a step


_STANDING: dict[int, dict] = {}  # what parallel_state holds, by tensor parallel ranks


@contextlib.contextmanager
def groups(tensor: int) -> Iterator[None]:
    """Megatron's process groups for one job; they stay for the next: gloo has a thread for each, which never sleeps."""
    from megacell.training.distributed import device

    with device.megatron():
        from megatron.core import parallel_state

        bare = dict(vars(parallel_state))
        if tensor not in _STANDING:
            parallel_state.initialize_model_parallel(tensor_model_parallel_size=tensor)
            _STANDING[tensor] = dict(vars(parallel_state))
        vars(parallel_state).update(_STANDING[tensor])
        try:
            yield
        finally:
            vars(parallel_state).update(bare)


def packs(step: int, rank: int, ranks: int, micro_batches: int = 2) -> list:
    """Return rank's share of a made-up step: cells of 5 to 60 tokens, cut into micro-batches, an odd pack padded."""
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
        if len(shown) % 2:
            shown, positions, starts = np.append(shown, 0), np.append(positions, 0), np.append(starts, len(shown) + 1)
        made.append(
            Pack(*map(torch.from_numpy, (shown, positions, starts.astype(np.int32))), int(np.diff(starts).max()),
                 *map(torch.from_numpy, (masked, tokens[masked])))
        )  # fmt: skip
    return made


def make_engine(network: dict | None = None, options: dict | None = None, kind: type | None = None, **layout):
    """Return an engine over a small network with its initial weights; the process groups stand.

    ``network`` and ``options`` hold what is changed of NETWORK and OPTIONS, ``layout`` the values of a ``Layout``.
    """
    import torch
    from megatron.core import parallel_state
    from omegaconf import OmegaConf

    from megacell.geneformer.model.bert import PackedBert
    from megacell.geneformer.model.config import ModelConfig
    from megacell.geneformer.model.initial_weights import initialise
    from megacell.training.engine import Engine
    from megacell.training.nn.layout import Layout

    if layout.get("compiled"):
        torch._dynamo.reset()  # torch allows a function so many graphs, and the tests have many networks
    sizes = ModelConfig(**{**NETWORK, **(network or {})})
    tensor = parallel_state.get_tensor_model_parallel_world_size()
    bert = (kind or PackedBert)(sizes, Layout(tensor=tensor, **layout))
    initialise(bert, sizes, seed=7)
    return Engine(OmegaConf.merge(OPTIONS, options or {}), bert)


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
    for name, parameter in engine.network.named_parameters():
        gradient = parameter.main_grad.detach().clone()
        if getattr(parameter, "tensor_model_parallel", False):
            parts = [torch.empty_like(gradient) for _ in range(state.get_tensor_model_parallel_world_size())]
            dist.all_gather(parts, gradient, group=state.get_tensor_model_parallel_group())
            gradient = torch.cat(parts, dim=parameter.partition_dim)
        found[name] = gradient.numpy()
    return found


def losses_and_gradients(tensor: int, *, steps: int = 20, plain: bool = False, **choices):
    """Train; return each step's mean loss over all ranks and its reduced gradients.

    ``plain`` takes the padded network with a head on every token; ``choices`` go to ``make_engine``.
    """
    import torch
    import torch.distributed as dist

    from megacell.training.distributed import device

    with groups(tensor), device.deterministic(choices.get("deterministic", False)):
        from megatron.core import parallel_state as state

        if plain:
            from plain import PlainBert

            choices["kind"] = PlainBert
        engine = make_engine(**choices)
        losses, gradients = [], []
        prepare = engine.optimizer.prepare_grads
        engine.optimizer.prepare_grads = lambda: (gradients.append(whole_gradients(engine)), prepare())[1]
        for step in range(steps):
            device.seed_step(0, step)
            result = engine.train_step(
                packs(step, state.get_data_parallel_rank(), state.get_data_parallel_world_size())
            )
            sums = torch.tensor([result.loss_sum, result.items], dtype=torch.float64)
            dist.all_reduce(sums, group=state.get_data_parallel_group())
            losses.append(float(sums[0] / sums[1]))
        return losses, gradients


def train(
    tensor: int,
    steps: int,
    *,
    folder: str | None = None,
    save_at: int | None = None,
    load: str | None = None,
    **choices,
) -> list:
    """Train with dropout, from the start or from a checkpoint, saving one on the way; return this rank's results."""
    from megacell.training.checkpoint import checkpoint
    from megacell.training.checkpoint.saver import Saver
    from megacell.training.distributed import device

    with groups(tensor):
        from megatron.core import parallel_state as state

        choices["network"] = {"hidden_dropout": 0.1, "attention_dropout": 0.1, **choices.get("network", {})}
        engine, results, first = make_engine(**choices), [], 0
        if load:
            first = checkpoint.load(Path(load), engine.network, engine.optimizer)["step"]
            engine.scheduler.step(first)
        for step in range(first, steps):
            device.seed_step(0, step)
            rank, ranks = state.get_data_parallel_rank(), state.get_data_parallel_world_size()
            results.append(engine.train_step(packs(step, rank, ranks)))
            if step + 1 == save_at:
                saver = Saver(Path(folder), engine.network, engine.optimizer, keep=2)
                saver.save(save_at, {})
        if save_at:
            saver.wait()  # written while training went on
        return results


def fp16_from_a_scale_too_large(steps: int, **optim) -> list:
    """Train in fp16; return each step's result and whether it changed any weight, on this rank or in float32."""
    from megacell.training.distributed import device

    with groups(1):
        engine = make_engine(precision="fp16", options={"steps": 2 * steps, "optim": optim})
        every = [*engine.network.parameters(), *engine.optimizer.get_parameters()]
        seen = []
        for step in range(steps):
            before = [parameter.detach().clone() for parameter in every]
            device.seed_step(0, step)
            result = engine.train_step(packs(step, 0, 1))
            seen.append((result, any(not a.equal(b) for a, b in zip(before, every, strict=True))))
        return seen


def dtypes(precision: str, reduce_fp32: bool) -> tuple[set[str], set[str], set[str]]:
    """Return the types of parameters, of their gradients as they are reduced, and of what the optimizer updates."""
    with groups(1):
        engine = make_engine(precision=precision, options={"parallel": {"reduce_fp32": reduce_fp32}})
        engine.train_step(packs(0, 0, 1))
        names = lambda tensors: {str(tensor.dtype).removeprefix("torch.") for tensor in tensors}  # noqa: E731
        parameters = list(engine.network.parameters())
        reduced = (parameter.main_grad for parameter in parameters)
        state = (t for s in engine.optimizer.optimizer.state.values() for k, t in s.items() if k != "step")
        return names(parameters), names(reduced), names([*engine.optimizer.get_parameters(), *state])


def tokens_in_a_layer(sequence: bool) -> tuple[int, int]:
    """Return a pack's tokens, and those that one of two tensor parallel ranks takes through a layer."""
    from megacell.training.distributed import device

    with groups(2):
        engine, seen = make_engine(sequence=sequence), []
        mlp = engine.network.encoder.layers[0].mlp
        mlp.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape[0]))
        device.seed_step(0, 0)
        (pack,) = packs(0, 0, 1, micro_batches=1)
        engine.train_step([pack])
        return len(pack.tokens), seen[0]


def losses_of_tiny(steps: int, **changes) -> list[float]:
    """Train `model=tiny` without dropout, and with changes, on cells whose genes stand in order; return mean losses."""
    import torch
    from omegaconf import OmegaConf

    from megacell.geneformer.model.bert import Pack
    from megacell.geneformer.pretraining.family import GENEFORMER
    from megacell.training.distributed import device

    tiny = OmegaConf.to_container(OmegaConf.load(GENEFORMER.configs / "model" / "tiny.yaml"))
    with groups(1):
        engine = make_engine(
            {**tiny, "vocabulary_size": 500, "hidden_dropout": 0.0, **changes}, {"steps": steps, "optim": {"lr": 1e-3}}
        )
        losses = []
        for step in range(steps):
            draw = np.random.default_rng(step)
            cells = [np.sort(draw.choice(np.arange(4, 500), 80, replace=False)) for _ in range(16)]
            tokens, masked = np.concatenate(cells), np.arange(draw.integers(7), 1280, 7)
            shown = tokens.copy()
            shown[masked] = 1
            arrays = shown, np.tile(np.arange(80), 16), np.arange(0, 1281, 80, dtype=np.int32)
            device.seed_step(0, step)
            result = engine.train_step(
                [Pack(*map(torch.from_numpy, arrays), 80, *map(torch.from_numpy, (masked, tokens[masked])))]
            )
            losses.append(result.loss_sum / result.items)
        return losses


def agree(*digests: str) -> str:
    """Check that the ranks see one store, of which each has opened another generation; return what is said."""
    import torch
    import torch.distributed as dist

    from megacell.core.errors import DataError
    from megacell.training.run.recorded import check_ranks_agree

    try:
        check_ranks_agree(digests[dist.get_rank()], "cells.store", torch.device("cpu"))
    except DataError as error:
        return str(error)
    return "agreed"
