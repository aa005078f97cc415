# SPDX-License-Identifier: Apache-2.0
"""Attention within each cell of a pack, as Megatron's core attention.

Shapes: T tokens of the pack, H heads of this tensor parallel rank, D size of a head.
"""

from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule

from megacell.training.nn.attention_backends import BACKENDS, choose_backend


class PackedAttention(MegatronModule):
    """Full attention inside each cell and none between cells; stands in Megatron's ``core_attention`` slot."""

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        **kwargs: Any,
    ):
        super().__init__(config)
        self.dropout = config.attention_dropout if attention_dropout is None else attention_dropout

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: None,
        *,
        packed_seq_params: PackedSeqParams,
        **kwargs: Any,
    ) -> torch.Tensor:
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
