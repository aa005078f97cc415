# SPDX-License-Identifier: Apache-2.0
"""The kernels that attend within each cell of a pack, and which of them can run where.

Each takes query, key, value [T, H, D] (T tokens of the pack, H heads of this rank, D size of a head), the cells' bounds
as ``PackedSeqParams`` and a dropout rate, and gives [T, H, D].
"""

import importlib.util
from functools import cache, partial
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F

from megacell.geneformer.model.dropping_attention import attend_dropping
from megacell.store.errors import UsageError


def choose_backend(device: torch.device, dtype: torch.dtype, dropout: float, asked: str = "auto") -> str:
    """Name the attention that runs: the one that was asked for, or else the fastest that is exact here.

    ``sequences``: SDPA a cell at a time, and with dropout on a CPU `attend_dropping`. ``varlen``: torch's
    variable-length flash kernel (CUDA, 16 bit, no dropout: it has none). ``nested``: SDPA over a jagged nested tensor
    (CUDA otherwise). Only when asked for: ``padded``: SDPA over cells padded to the longest, under a mask;
    ``transformer_engine`` (CUDA, 16 bit).
    """
    if asked != "auto":
        return asked
    if device.type == "cpu":
        return "sequences"
    return "varlen" if dtype in (torch.bfloat16, torch.float16) and dropout == 0 else "nested"


def check_backend(asked: str, precision: str, dropout: float) -> None:
    """Raise UsageError if the attention that was asked for cannot run on this machine in this way."""
    if asked not in ("varlen", "transformer_engine"):
        return
    reason = None
    if not torch.cuda.is_available():
        reason = "needs a GPU, and torch sees none"
    elif precision == "fp32":
        reason = "works in 16 bit only: set precision=bf16"
    elif asked == "varlen" and dropout:
        reason = "has no dropout: set model.attention_dropout=0"
    elif asked == "transformer_engine" and importlib.util.find_spec(asked) is None:
        reason = "is not installed: pip install 'transformer-engine[pytorch]'"
    if reason:
        raise UsageError(f"attention={asked}: {reason}, or leave it at attention=auto")


def _sequences(query, key, value, packed: Any, dropout: float):
    bounds = packed.cu_seqlens_q.tolist()
    if dropout and query.device.type == "cpu":
        return attend_dropping(query, key, value, bounds, dropout)
    q, k, v = (x.transpose(0, 1) for x in (query, key, value))  # [H, T, D]
    cells = [
        F.scaled_dot_product_attention(q[None, :, a:b], k[None, :, a:b], v[None, :, a:b], dropout_p=dropout)
        for a, b in pairwise(bounds)
    ]
    return torch.cat(cells, dim=2)[0].transpose(0, 1)


def _nested(query, key, value, packed: Any, dropout: float):
    offsets, longest = packed.cu_seqlens_q.long(), packed.max_seqlen_q
    jagged = partial(torch.nested.nested_tensor_from_jagged, offsets=offsets, min_seqlen=1, max_seqlen=longest)
    q, k, v = (jagged(x.contiguous()).transpose(1, 2) for x in (query, key, value))
    return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout).transpose(1, 2).values()


def _varlen(query, key, value, packed: Any, dropout: float):
    from torch.nn.attention.varlen import varlen_attn

    bounds, longest = packed.cu_seqlens_q, packed.max_seqlen_q
    return varlen_attn(query, key, value, bounds, bounds, longest, longest)


def _padded(query, key, value, packed: Any, dropout: float):
    lengths = packed.cu_seqlens_q.diff()
    real = torch.arange(packed.max_seqlen_q, device=query.device) < lengths[:, None]  # [cells, longest]

    def padded(x):
        return x.new_zeros((*real.shape, *x.shape[1:])).index_put((real,), x).transpose(1, 2)

    out = F.scaled_dot_product_attention(
        padded(query), padded(key), padded(value), attn_mask=real[:, None, None], dropout_p=dropout
    )
    return out.transpose(1, 2)[real]


@cache
def _transformer_engine_of(heads: int, size: int, dropout: float):
    from transformer_engine.pytorch import DotProductAttention

    return DotProductAttention(
        heads, size, attention_dropout=dropout, qkv_format="thd", attn_mask_type="padding", attention_type="self"
    )


def _transformer_engine(query, key, value, packed: Any, dropout: float):
    """Call Transformer Engine as its documentation has it; it has not been run on a GPU here.

    It holds no weights. In this format it takes cuDNN's kernel (Hopper or newer) or FlashAttention's, and raises where
    it has neither; version 3 of the latter has no dropout. Dropout draws from CUDA's default generator.
    """
    bounds, longest = packed.cu_seqlens_q, packed.max_seqlen_q
    out = _transformer_engine_of(query.shape[1], query.shape[2], dropout)(
        query, key, value, cu_seqlens_q=bounds, cu_seqlens_kv=bounds, max_seqlen_q=longest, max_seqlen_kv=longest
    )
    return out.view(query.shape)


BACKENDS = {
    "sequences": _sequences,
    "nested": _nested,
    "varlen": _varlen,
    "padded": _padded,
    "transformer_engine": _transformer_engine,
}
