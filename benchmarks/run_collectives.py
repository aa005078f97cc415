# SPDX-License-Identifier: Apache-2.0
"""What ranks need for a reduce-scatter and an all-gather in float32: prints seconds by bytes, as JSON, on rank 0.

Run by torchrun through `run_pinned.py`; these two, one after the other, are what a training step exchanges.
"""

import json
import statistics
import time
import warnings

import torch
import torch.distributed as dist

from megacell.training.distributed import device

REPEATS = 20


def main(words: list[str]) -> int:
    """Measure each number of bytes."""
    warnings.filterwarnings(
        "ignore", message=r"`torch\.distributed\.\w+` is deprecated"
    )  # they are what Megatron calls
    device.use_local()
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    found = {size: statistics.median(_seconds(int(size))) for size in words}
    if dist.get_rank() == 0:
        print(json.dumps(found), flush=True)
    dist.destroy_process_group()
    return 0


def _seconds(size: int) -> list[float]:
    """Return the seconds of each round but the first."""
    ranks = dist.get_world_size()
    part = torch.zeros(max(1, size // 4 // ranks), device=device.device())
    whole = torch.zeros(ranks * len(part), device=part.device)
    seconds = []
    for _ in range(REPEATS + 1):
        _together(part)
        start = time.perf_counter()
        dist.reduce_scatter_tensor(part, whole)
        dist.all_gather_into_tensor(whole, part)
        _together(part)
        seconds.append(time.perf_counter() - start)
    return seconds[1:]


def _together(tensor: torch.Tensor) -> None:
    if tensor.is_cuda:
        torch.cuda.synchronize()
    else:
        dist.barrier()
