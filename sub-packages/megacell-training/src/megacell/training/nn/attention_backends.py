# SPDX-License-Identifier: Apache-2.0
"""The kernels that attend within each cell of a pack, and which of them can run where.

Each takes query, key, value [T, H, D] (T tokens of the pack, H heads of this rank, D size of a head), the cells' bounds
as ``PackedSeqParams`` and a dropout rate, and gives [T, H, D].
"""

import importlib.util
import math
from collections.abc import Callable
from functools import cache
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F

from megacell.core.errors import UsageError
from megacell.training.nn.cpu_attention import attend_dropping
from megacell.training.nn.cudnn_attention import attend_cudnn


def choose_backend(device: torch.device, dtype: torch.dtype, asked: str = "auto") -> str:
    """Return the name of the kernel that attends: the one asked for, or one that is exact here and torch's own.

    ``sequences``: SDPA a cell at a time, and with dropout on a CPU `attend_dropping`. ``flash``: FlashAttention 2 as
    torch builds it (CUDA from compute capability 8.0 on, 16 bit). ``efficient``: torch's memory-efficient kernel (CUDA,
    also float32). Only when asked for: ``cudnn``: cuDNN's kernel, see `cudnn_attention`; ``padded``: SDPA over cells
    padded to the longest, under a mask; ``transformer_engine`` (CUDA, 16 bit).
    """
    if asked != "auto":
        return asked
    if device.type == "cpu":
        return "sequences"
    return "flash" if dtype in (torch.bfloat16, torch.float16) else "efficient"


_PACKAGES = {"transformer_engine": "transformer-engine[pytorch]", "cudnn": "nvidia-cudnn-frontend"}


def check_backend(asked: str, precision: str) -> None:
    """Raise UsageError if the attention that was asked for cannot run on this machine in this way."""
    if asked not in ("flash", "efficient", "cudnn", "transformer_engine"):
        return
    reason = None
    if not torch.cuda.is_available():
        reason = "needs a GPU, and torch sees none"
    elif precision == "fp32" and asked != "efficient":
        reason = "works in 16 bit only: set precision=bf16"
    elif asked in _PACKAGES and importlib.util.find_spec(asked) is None:
        reason = f"is not installed: pip install '{_PACKAGES[asked]}'"
    if reason:
        raise UsageError(f"attention={asked}: {reason}, or leave it at attention=auto")


def _sequences(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, packed: Any, dropout: float
) -> torch.Tensor:
    bounds = packed.cu_seqlens_q.tolist()
    if dropout and query.device.type == "cpu":
        return attend_dropping(query, key, value, bounds, dropout)
    q, k, v = (x.transpose(0, 1) for x in (query, key, value))  # [H, T, D]
    cells = [
        F.scaled_dot_product_attention(q[None, :, a:b], k[None, :, a:b], v[None, :, a:b], dropout_p=dropout)
        for a, b in pairwise(bounds)
    ]
    return torch.cat(cells, dim=2)[0].transpose(0, 1)


def _flash(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, packed: Any, dropout: float) -> torch.Tensor:
    """Call what `scaled_dot_product_attention` calls, with the bounds of packed cells and with dropout.

    `torch.nn.attention.varlen` calls it too, and passes no dropout on. It has not been run on a GPU here.
    """
    bounds, longest, scale = packed.cu_seqlens_q, packed.max_seqlen_q, 1 / math.sqrt(query.shape[-1])
    out: torch.Tensor = torch.ops.aten._flash_attention_forward(
        *_multiple_of_8(query, key, value), bounds, bounds, longest, longest, dropout, False, False, scale=scale
    )[0]
    return out[..., : query.shape[-1]]


def _efficient(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, packed: Any, dropout: float
) -> torch.Tensor:
    """Call torch's other kernel in the same way; it has not been run on a GPU here."""
    bounds, longest, scale = packed.cu_seqlens_q, packed.max_seqlen_q, 1 / math.sqrt(query.shape[-1])
    q, k, v = (x[None] for x in _multiple_of_8(query, key, value))
    keep = torch.is_grad_enabled()  # what the backward pass needs
    out: torch.Tensor = torch.ops.aten._efficient_attention_forward(
        q, k, v, None, bounds, bounds, longest, longest, dropout, 0, keep, scale=scale
    )[0]
    return out[0, ..., : query.shape[-1]]


def _multiple_of_8(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Fill heads up to the size that the kernels take; zeros change no product."""
    missing = -tensors[0].shape[-1] % 8
    return tensors if not missing else tuple(F.pad(x, (0, missing)) for x in tensors)


def _padded(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, packed: Any, dropout: float) -> torch.Tensor:
    lengths = packed.cu_seqlens_q.diff()
    real = torch.arange(packed.max_seqlen_q, device=query.device) < lengths[:, None]  # [cells, longest]

    def padded(x: torch.Tensor) -> torch.Tensor:
        return x.new_zeros((*real.shape, *x.shape[1:])).index_put((real,), x).transpose(1, 2)

    out = F.scaled_dot_product_attention(
        padded(query), padded(key), padded(value), attn_mask=real[:, None, None], dropout_p=dropout
    )
    return out.transpose(1, 2)[real]


@cache
def _transformer_engine_of(heads: int, size: int, dropout: float) -> Any:
    from transformer_engine.pytorch import DotProductAttention

    return DotProductAttention(
        heads, size, attention_dropout=dropout, qkv_format="thd", attn_mask_type="padding", attention_type="self"
    )


def _transformer_engine(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, packed: Any, dropout: float
) -> torch.Tensor:
    """Call Transformer Engine as its documentation has it; it has not been run on a GPU here.

    It holds no weights. In this format it takes cuDNN's kernel (Hopper or newer) or FlashAttention's, and raises where
    it has neither; version 3 of the latter has no dropout. Dropout draws from CUDA's default generator.
    """
    bounds, longest = packed.cu_seqlens_q, packed.max_seqlen_q
    out: torch.Tensor = _transformer_engine_of(query.shape[1], query.shape[2], dropout)(
        query, key, value, cu_seqlens_q=bounds, cu_seqlens_kv=bounds, max_seqlen_q=longest, max_seqlen_kv=longest
    )
    return out.view(query.shape)


BACKENDS: dict[str, Callable[[torch.Tensor, torch.Tensor, torch.Tensor, Any, float], torch.Tensor]] = {
    "sequences": _sequences,
    "flash": _flash,
    "efficient": _efficient,
    "cudnn": attend_cudnn,
    "padded": _padded,
    "transformer_engine": _transformer_engine,
}
