# SPDX-License-Identifier: Apache-2.0
"""Attention within each cell of a pack, as Megatron's core attention.

Shapes: T tokens of the pack, H heads of this tensor parallel rank, D size of a head.
"""

import math
from itertools import pairwise

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from megatron.core.transformer.module import MegatronModule

from megacell.geneformer.model.backends import BACKENDS, choose_backend


class PackedAttention(MegatronModule):
    """Full attention inside each cell and none between cells; stands in Megatron's ``core_attention`` slot."""

    def __init__(self, config, layer_number, attn_mask_type, attention_type, attention_dropout=None, **kwargs):
        super().__init__(config)
        self.dropout = config.attention_dropout if attention_dropout is None else attention_dropout

    def forward(self, query, key, value, attention_mask, *, packed_seq_params: PackedSeqParams, **kwargs):
        """Attend.

        Parameters
        ----------
        query, key, value : Tensor [T, H, D]
        attention_mask : None
            The cells' bounds stand in ``packed_seq_params`` instead.
        packed_seq_params : PackedSeqParams

        Returns
        -------
        Tensor [T, H * D]
        """
        dropout = self.dropout if self.training else 0.0
        attend = BACKENDS[choose_backend(query.device, query.dtype, self.config.attention)]
        if dropout and not self.config.sequence_parallel:  # under it the whole encoder is inside of such a fork
            with get_cuda_rng_tracker().fork():  # each tensor parallel rank drops in its own heads
                out = attend(query, key, value, packed_seq_params, dropout)
        else:
            out = attend(query, key, value, packed_seq_params, dropout)
        return out.reshape(out.shape[0], -1)


def attention_maps(bert, pack, layer: int) -> list[torch.Tensor]:
    """Return the attention weights of one layer, cell by cell; of a model in one process, dropout off.

    Parameters
    ----------
    bert : PackedBert
    pack : Pack
        Of C cells.
    layer : int
        From 1.

    Returns
    -------
    list of Tensor, float32 [heads, tokens, tokens], C of them
        Each row sums to 1.
    """
    kept: list[torch.Tensor] = []

    def compute(module, given, named) -> None:
        query, key = (x.transpose(0, 1).float() for x in given[:2])  # [H, T, D]
        for a, b in pairwise(pack.cu_seqlens.tolist()):
            scores = query[:, a:b] @ key[:, a:b].transpose(1, 2) / math.sqrt(query.shape[-1])
            kept.append(torch.softmax(scores, -1))

    inner = bert.encoder.layers[layer - 1].self_attention.core_attention
    hook = inner.register_forward_pre_hook(compute, with_kwargs=True)
    try:
        bert.encode(pack)
    finally:
        hook.remove()
    return kept
