# SPDX-License-Identifier: Apache-2.0
"""Megatron-core's BERT over packed cells, with the LM head only where a gene was masked.

Shapes: T tokens of the pack, M masked positions, V rows of this rank's part of the vocabulary, h hidden size.
"""

from dataclasses import dataclass

import torch
from megatron.core import tensor_parallel
from megatron.core.models.bert.bert_model import BertModel
from megatron.core.packed_seq_params import PackedSeqParams

from megacell.geneformer.model.config import ModelConfig, megatron_config
from megacell.geneformer.model.layers import layer_spec


@dataclass
class Pack:
    """One micro-batch on the model's device.

    Attributes
    ----------
    tokens, positions : int64 [T]
        What the network sees, and each token's rank within its cell.
    cu_seqlens : int32 [cells + 1]
        Where each cell starts; the last is T.
    max_seqlen : int
    masked, labels : int64 [M]
        Positions in the pack that are predicted, and the genes that stood there.
    """

    tokens: torch.Tensor
    positions: torch.Tensor
    cu_seqlens: torch.Tensor
    max_seqlen: int
    masked: torch.Tensor
    labels: torch.Tensor

    @classmethod
    def of(cls, batch, device: torch.device | str = "cpu") -> "Pack":
        """Move a ``MicroBatch`` (numpy) to ``device``, and widen there what the network indexes with.

        To CUDA through pinned memory: only from there does a copy run beside what the device computes.
        """
        pinned = torch.device(device).type == "cuda"

        def move(array) -> torch.Tensor:
            tensor = torch.from_numpy(array)
            return (tensor.pin_memory() if pinned else tensor).to(device, non_blocking=True)

        return cls(
            move(batch.tokens).long(), move(batch.positions).long(), move(batch.cu_seqlens), batch.max_seqlen,
            move(batch.masked).long(), move(batch.labels).long(),
        )  # fmt: skip


class PackedBert(BertModel):
    """Geneformer's network: one pack in, one loss a masked gene out.

    Parameters
    ----------
    model : ModelConfig
    tensor_parallel_size : int
        As the process groups stand.
    precision : {"fp32", "bf16"}
    """

    def __init__(self, model: ModelConfig, *, tensor_parallel_size: int = 1, precision: str = "fp32"):
        super().__init__(
            config=megatron_config(model, tensor_parallel=tensor_parallel_size, precision=precision),
            num_tokentypes=0,
            transformer_layer_spec=layer_spec(),
            vocab_size=model.padded_vocabulary,
            max_sequence_length=model.max_length,
            share_embeddings_and_output_weights=True,
            parallel_output=True,
            add_binary_head=False,
        )
        if precision == "bf16":
            self.bfloat16()  # norms and positions too, which are plain torch modules

    def _sanity_check_attention_and_get_attn_mask_dimension(self) -> str:
        return "b1ss"  # unused: the parent raises for any attention but its own where Transformer Engine is absent

    def encode(self, pack: Pack) -> torch.Tensor:
        """Return the hidden states [T, h] after the final norm."""
        embedded = self.embedding(pack.tokens[None], pack.positions[None])  # [T, 1, h]
        bounds, longest = pack.cu_seqlens, pack.max_seqlen
        packed = PackedSeqParams("thd", bounds, bounds, max_seqlen_q=longest, max_seqlen_kv=longest)
        return self.encoder(embedded, attention_mask=None, packed_seq_params=packed).squeeze(1)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return the LM head's logits [M, V] for hidden states [M, h]."""
        transformed = self.lm_head(hidden[:, None])
        return self.output_layer(transformed, weight=self.shared_embedding_or_output_weight())[0].squeeze(1)

    def forward(self, pack: Pack) -> torch.Tensor:
        """Return the cross-entropy [M], float32, in nats, at the masked positions."""
        logits = self.logits(self.encode(pack)[pack.masked])
        return tensor_parallel.vocab_parallel_cross_entropy(logits, pack.labels)
