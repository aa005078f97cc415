# SPDX-License-Identifier: Apache-2.0
"""What Megatron-core's encoder is made of here: its cut matrices, our layer, packed attention and norms.

Shapes: T tokens that this rank works on, h hidden size.
"""

from typing import Any

import torch
import torch.distributed as dist
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer import TransformerConfig, TransformerLayer
from megatron.core.transformer.mlp import MLP, MLPSubmodules

from megacell.training.nn.fusion import bias_activation, bias_dropout_sum, bias_dropout_sum_norm, fused


class Norm(torch.nn.LayerNorm):
    """LayerNorm as Megatron-core builds it; under sequence parallelism its gradients are summed over the ranks."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float):
        super().__init__(hidden_size, eps=eps)
        for parameter in self.parameters():
            parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]


class _BiasAtOnce:
    """A linear layer of Megatron, whose bias is added within the product where one rank holds all of it.

    Megatron adds it afterwards, in a pass of its own over the memory, to fuse it with the dropout of training.
    """

    tp_group: dist.ProcessGroup
    weight: torch.Tensor
    bias: torch.Tensor | None

    def forward(self, states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return (product, bias that is still to be added), for states [T, 1, size]."""
        if self.tp_group.size() == 1:
            return torch.nn.functional.linear(states, self.weight, self.bias), None
        product: tuple[torch.Tensor, torch.Tensor | None] = super().forward(states)  # type: ignore[misc]
        return product


class ColumnLinear(_BiasAtOnce, ColumnParallelLinear):
    """Cut along what it gives."""


class RowLinear(_BiasAtOnce, RowParallelLinear):
    """Cut along what it takes."""


class SummingNorm(Norm):
    """A norm of what it sums up itself: a module, since Megatron gathers weights before the call of what holds them."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float):
        super().__init__(config, hidden_size, eps)
        self.sum_and_norm = fused(bias_dropout_sum_norm, config.compiled)

    def forward(  # type: ignore[override]
        self, values: torch.Tensor, bias: torch.Tensor | None, residual: torch.Tensor, rate: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return residual + dropout(values + bias) and its norm, both [T, 1, h]."""
        return self.sum_and_norm(values, bias, residual, rate, self.weight, self.bias, self.eps)


class FeedForward(MLP):
    """Megatron's feed-forward layer, its bias and activation in one operation."""

    def __init__(self, config: TransformerConfig):
        parts = MLPSubmodules(linear_fc1=ColumnLinear, linear_fc2=RowLinear)
        super().__init__(config, parts, ffn_hidden_size=config.ffn_hidden_size)
        self.activate = fused(bias_activation, config.compiled)

    def forward(self, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return what is to be summed up, [T, 1, h], and its bias [h], if it is still to be added."""
        activated = self.activate(*self.linear_fc1(hidden), self.config.activation_func)
        out: tuple[torch.Tensor, torch.Tensor | None] = self.linear_fc2(activated)
        return out


class Layer(TransformerLayer):
    """A pre-LN layer; attention and feed-forward layer are each summed up with what went around them."""

    def __init__(self, config: TransformerConfig, *args: Any, **kwargs: Any):
        super().__init__(config, *args, **kwargs)
        self.sum_up = fused(bias_dropout_sum, config.compiled)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: None = None,
        packed_seq_params: PackedSeqParams | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, None]:
        """Return ([T, 1, h], None), as Megatron's layer does."""
        normed = self.input_layernorm(hidden_states)
        attended = self.self_attention(normed, attention_mask=attention_mask, packed_seq_params=packed_seq_params)
        summed, normed = self.pre_mlp_layernorm(*attended, hidden_states, self.rate)
        return self.sum_up(*self.mlp(normed), summed, self.rate), None

    @property
    def rate(self) -> float:
        """Share of the values that are dropped now."""
        return self.hidden_dropout if self.training else 0.0


class PostNormLayer(Layer):
    """BERT's post-LN layer under the names of the pre-LN one, with every norm moved on by one place.

    ``input_layernorm`` is the norm that ends the layer before, and in the first layer that of the embeddings, after
    which they are dropped out; ``pre_mlp_layernorm`` ends attention; the encoder's final norm ends the last layer.
    What a norm gives is both the input and the residual of what follows.
    """

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: None = None,
        packed_seq_params: PackedSeqParams | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, None]:
        """Return ([T, 1, h], None), as Megatron's layer does."""
        normed = self.input_layernorm(hidden_states)
        if self.layer_number == 1:
            normed = torch.nn.functional.dropout(normed, self.rate)
        attended = self.self_attention(normed, attention_mask=attention_mask, packed_seq_params=packed_seq_params)
        _, normed = self.pre_mlp_layernorm(*attended, normed, self.rate)
        return self.sum_up(*self.mlp(normed), normed, self.rate), None
