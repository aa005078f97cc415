# SPDX-License-Identifier: Apache-2.0
"""Cross-entropy over logits that are cut along the vocabulary, with one copy of them, in their own type.

Shapes: M masked positions, V rows of this rank's part of the vocabulary.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist

from megacell.training.nn.fusion import fused, sum_of_exponentials, write_gradient

ROWS = {"cpu": 64, "cuda": 8192}  # worked on at a time in float32: they fit a CPU's cache; a GPU wants longer kernels


class _CutCrossEntropy(torch.autograd.Function):
    """Keeps the logits and a float a row for the backward pass, which writes the gradient over the logits."""

    @staticmethod
    def forward(
        ctx: Any, logits: torch.Tensor, labels: torch.Tensor, group: dist.ProcessGroup, compiled: bool
    ) -> torch.Tensor:
        size = logits.shape[1]
        local = labels - group.rank() * size
        mine = (local >= 0) & (local < size)
        local = local.clamp(0, size - 1)
        top = logits.amax(1).float()
        if group.size() > 1:
            dist.all_reduce(top, dist.ReduceOp.MAX, group=group)
        picked = torch.where(mine, logits.gather(1, local[:, None])[:, 0] - top, 0.0)
        summed = torch.cat([fused(sum_of_exponentials, compiled)(*block) for block in _blocks(logits, top)])
        both = torch.stack([picked, summed])
        if group.size() > 1:
            dist.all_reduce(both, group=group)
        picked, normaliser = both[0], both[1].log()
        ctx.save_for_backward(logits, local, mine.float(), normaliser + top)
        ctx.compiled = compiled
        return normaliser - picked

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        logits, local, mine, normaliser = ctx.saved_tensors
        for block in _blocks(logits, local, mine, normaliser, gradient):
            fused(write_gradient, ctx.compiled)(*block)
        return logits, None, None, None


def _blocks(*tensors: torch.Tensor) -> Iterator[tuple[torch.Tensor, ...]]:
    """Cut all along their rows into plain tensors, of even sizes.

    A compiled kernel would be made anew for a view of something else, and for a last block of one row.
    """
    count = max(1, -(-len(tensors[0]) // ROWS[tensors[0].device.type]))
    return zip(*([part.data for part in tensor.tensor_split(count)] for tensor in tensors), strict=True)


def cut_cross_entropy(
    logits: torch.Tensor, labels: torch.Tensor, group: dist.ProcessGroup, compiled: bool = False
) -> torch.Tensor:
    """Return the cross-entropy [M] in nats, float32.

    Parameters
    ----------
    logits : Tensor [M, V]
        This rank's; its backward pass writes over them, and may run once.
    labels : int64 [M]
        Of the whole vocabulary.
    group : ProcessGroup
        The tensor parallel ranks.
    compiled : bool
        Compile its element-wise operations.
    """
    apply: Callable[..., torch.Tensor] = _CutCrossEntropy.apply
    return apply(logits, labels, group, compiled)
