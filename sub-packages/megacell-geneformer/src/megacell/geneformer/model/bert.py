# SPDX-License-Identifier: Apache-2.0
"""BERT over packed cells from Megatron-core's parts, with the LM head only where a gene was masked.

Shapes: T tokens of the pack, M masked positions, V rows of this rank's part of the vocabulary, h hidden size.
"""

import copy
from dataclasses import dataclass

import torch
from megatron.core.models.bert.bert_layer_specs import bert_layer_local_spec
from megatron.core.models.common.embeddings.language_model_embedding import LanguageModelEmbedding
from megatron.core.models.common.language_module.language_module import LanguageModule
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel import ColumnParallelLinear, gather_from_sequence_parallel_region
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_block import TransformerBlock, TransformerBlockSubmodules

from megacell.geneformer.model.config import ModelConfig, megatron_config
from megacell.training.nn.cross_entropy import cut_cross_entropy
from megacell.training.nn.layers import ColumnLinear, FeedForward, Layer, Norm, PostNormLayer, RowLinear, SummingNorm
from megacell.training.nn.layout import Layout
from megacell.training.nn.packed_attention import PackedAttention
from megacell.training.nn.weights import allocate


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


class PackedBert(LanguageModule):
    """Geneformer's network: one pack in, one loss a masked gene out. Weights are zeros until `model.init` fills them.

    Its parts have the names of Megatron-core's ``BertModel``, which knows neither packs nor post-LN, and whose head
    would work on every token and on this rank's tokens only.

    Parameters
    ----------
    model : ModelConfig
    layout : Layout
        As the process groups stand. Under sequence parallelism T must divide into the tensor parallel ranks.
    """

    def __init__(self, model: ModelConfig, layout: Layout):
        config = megatron_config(model, layout)
        with torch.device("meta"):  # Megatron would make each weight several times over, and leave holes in the memory
            super().__init__(config)
            self._make_parts(model, config)
        allocate(self)

    def _make_parts(self, model: ModelConfig, config: TransformerConfig) -> None:
        self.norm = model.norm
        self.pre_process = self.post_process = True  # both ends of the network are here: no pipeline
        self.share_embeddings_and_output_weights = model.tied_head
        self.embedding = LanguageModelEmbedding(config, model.padded_vocabulary, model.max_length)
        if model.norm == "post":
            self.embedding.embedding_dropout.p = 0.0  # the first layer drops out, after its norm
        self.encoder = TransformerBlock(config, encoder_parts(model))
        whole = copy.copy(config)  # each rank sees all masked positions: here nothing is sequence parallel
        whole.sequence_parallel = False
        self.lm_head = LMHead(whole)
        self.output_layer = ColumnParallelLinear(
            model.hidden,
            model.padded_vocabulary,
            config=whole,
            init_method=config.init_method,
            skip_weight_param_allocation=model.tied_head,
        )
        self.setup_embeddings_and_output_layer()
        self.to(config.params_dtype)  # norms and positions too, which are plain torch modules

    def set_input_tensor(self, tensor) -> None:
        """Nothing here: Megatron's schedule would hand over what another pipeline stage computed."""

    def encode(self, pack: Pack) -> torch.Tensor:
        """Return the hidden states [T, h] after the final norm."""
        embedded = self.embedding(pack.tokens[None], pack.positions[None])  # [T, 1, h]
        bounds, longest = pack.cu_seqlens, pack.max_seqlen
        packed = PackedSeqParams("thd", bounds, bounds, max_seqlen_q=longest, max_seqlen_kv=longest)
        hidden = self.encoder(embedded, attention_mask=None, packed_seq_params=packed)
        if self.config.sequence_parallel:  # what follows is the same on all ranks, and so is its gradient
            hidden = gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=False)
        return hidden.squeeze(1)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return the LM head's logits [M, V] for hidden states [M, h]."""
        tied = self.shared_embedding_or_output_weight() if self.share_embeddings_and_output_weights else None
        return self.output_layer(self.lm_head(hidden), weight=tied)[0]

    def forward(self, pack: Pack) -> torch.Tensor:
        """Return the cross-entropy [M], float32, in nats, at the masked positions."""
        return self._losses(self.logits(self.encode(pack)[pack.masked]), pack)

    def predict(self, pack: Pack) -> tuple[torch.Tensor, torch.Tensor]:
        """Return what `forward` does and the likeliest token [M], int64; for a single tensor parallel rank."""
        logits = self.logits(self.encode(pack)[pack.masked])
        likeliest = logits.argmax(1)
        return self._losses(logits, pack), likeliest

    def _losses(self, logits: torch.Tensor, pack: Pack) -> torch.Tensor:
        return cut_cross_entropy(logits, pack.labels, self.tp_group, self.config.compiled)


class LMHead(MegatronModule):
    """What stands before the decoder: dense, activation, LayerNorm; whole on every rank, never sequence parallel."""

    def __init__(self, config: TransformerConfig):
        super().__init__(config)
        self.dense = torch.nn.Linear(config.hidden_size, config.hidden_size, dtype=config.params_dtype)
        self.layer_norm = Norm(config, config.hidden_size, config.layernorm_epsilon)
        self.activation = (
            torch.nn.functional.relu if config.activation_func is torch.nn.functional.relu else torch.nn.functional.gelu
        )

    def forward(self, hidden):
        """Return [M, h] for hidden states [M, h]."""
        return self.layer_norm(self.activation(self.dense(hidden)))


def encoder_parts(model: ModelConfig) -> TransformerBlockSubmodules:
    """Return the layers and the final norm that Megatron-core's ``TransformerBlock`` is to build."""
    spec = copy.deepcopy(bert_layer_local_spec)
    parts = spec.submodules
    spec.module = Layer if model.norm == "pre" else PostNormLayer
    parts.input_layernorm, parts.pre_mlp_layernorm, parts.mlp = Norm, SummingNorm, FeedForward
    attention = parts.self_attention.submodules
    attention.linear_qkv, attention.core_attention, attention.linear_proj = ColumnLinear, PackedAttention, RowLinear
    return TransformerBlockSubmodules(layer_specs=[spec] * model.layers, layer_norm=Norm)
