# SPDX-License-Identifier: Apache-2.0
"""What the tests of checkpoints run inside a pool's ranks."""

import contextlib
import io
from functools import partial
from pathlib import Path
from unittest import mock

import numpy as np

import jobs

BUCKET = 5_000  # parameters: the network's gradients are then reduced in several buckets, as a large network's are


@contextlib.contextmanager
def small_buckets():
    """Have Megatron reduce gradients in several buckets, which it does only from 40 million parameters on."""
    from megatron.core.distributed import DistributedDataParallelConfig

    from megacell.training import engine

    smaller = partial(DistributedDataParallelConfig, bucket_size=BUCKET)
    with mock.patch.object(engine, "DistributedDataParallelConfig", smaller):
        yield


def train(tensor: int, first: int, last: int, folder: str, middle: int, buckets: bool = False):
    """Train without dropout from a checkpoint of step ``first``, or from the start; save at ``middle`` and ``last``.

    Returns the steps' mean losses over all ranks, the reduced gradients of the step after ``middle``, and how many
    buckets gradients were reduced in.
    """
    import torch
    import torch.distributed as dist

    from megacell.training.checkpoint import checkpoint
    from megacell.training.checkpoint.saver import Saver

    with jobs.groups(tensor), small_buckets() if buckets else contextlib.nullcontext():
        from megatron.core import parallel_state as state

        engine = jobs.make_engine()
        checkpoint.begin_state(engine.optimizer)
        if first:
            checkpoint.load(Path(folder) / f"step-{first:08d}", engine.network, engine.optimizer)
            engine.scheduler.step(first)
        losses: list[float] = []
        gradients: dict[int, dict[str, np.ndarray]] = {}
        prepare = engine.optimizer.prepare_grads

        def note_and_prepare():
            gradients[first + len(losses)] = jobs.whole_gradients(engine)
            return prepare()

        engine.optimizer.prepare_grads = note_and_prepare
        saver = Saver(Path(folder), engine.network, engine.optimizer, keep=9)
        for step in range(first, last):
            packs = jobs.packs(step, state.get_data_parallel_rank(), state.get_data_parallel_world_size())
            result = engine.train_step(packs)
            sums = torch.tensor([result.loss_sum, result.items], dtype=torch.float64)
            dist.all_reduce(sums, group=state.get_data_parallel_group())
            losses.append(float(sums[0] / sums[1]))
            if step + 1 in (middle, last):
                saver.save(step + 1, {})
        saver.wait()
        return losses, gradients.get(middle), sum(len(buffer.buckets) for buffer in engine.ddp.buffers)


def begin() -> tuple[list[bytes], list[bytes]]:
    """Return a network's weights before and after its optimizer's state is made, at a learning rate above 0."""
    from megacell.training.checkpoint import checkpoint

    with jobs.groups(1):
        engine = jobs.make_engine()
        for group in engine.optimizer.param_groups:
            group["lr"] = 0.1
        before = [weight.detach().numpy().tobytes() for weight in engine.network.parameters()]
        checkpoint.begin_state(engine.optimizer)
        assert all(group["lr"] == 0.1 for group in engine.optimizer.param_groups)
        return before, [weight.detach().numpy().tobytes() for weight in engine.network.parameters()]


def pretrain(settings: list[str], spoilt: dict[int, float]) -> tuple[int, str]:
    """Run `megacell pretrain` on these ranks, which stand and have imported what it takes; return code and output.

    In the steps of ``spoilt``, counted from 0, the last rank's losses, and so its gradients, are multiplied.
    """
    import torch
    import torch.distributed as dist

    from megacell.training import engine
    from megacell.training.distributed import device
    from megacell.training.run.pretrain import main

    seed_step, forward_step, factor = device.seed_step, engine._forward_step, 1.0

    def note_step(seed, step):
        nonlocal factor
        factor = spoilt.get(step, 1.0) if dist.get_rank() == dist.get_world_size() - 1 else 1.0
        seed_step(seed, step)

    def spoil(packs, model):
        output, summed = forward_step(packs, model)
        return output, (lambda losses: summed(losses * factor)) if torch.is_grad_enabled() else summed

    with (
        contextlib.redirect_stdout(io.StringIO()) as out,
        mock.patch.object(device, "seed_step", note_step),
        mock.patch.object(engine, "_forward_step", spoil),
    ):
        return main(settings), out.getvalue()
