# SPDX-License-Identifier: Apache-2.0
"""A regression on packed samples: two linear layers, cut over tensor parallel ranks, and a sum over each sample.

Shapes: T values of all samples together, F features, N samples.
"""

from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import MegatronModule

from megacell.training.nn.layout import Layout


@dataclass
class Samples:
    """Some samples: values float32 [T, F], the sample of each (int64 [T]), targets float32 [N]."""

    values: torch.Tensor
    sample: torch.Tensor
    targets: torch.Tensor


class ToyNetwork(MegatronModule):
    """Predicts a number for each sample; its weights are still to be filled."""

    def __init__(self, features: int, hidden: int, dropout: float, layout: Layout):
        options = {**layout.megatron_options(), "sequence_parallel": False}
        config = TransformerConfig(
            num_layers=1, hidden_size=hidden, num_attention_heads=layout.tensor, hidden_dropout=dropout, **options
        )
        super().__init__(config)
        shared: dict[str, Any] = {"config": config, "init_method": config.init_method, "bias": True}
        self.up = ColumnParallelLinear(features, hidden, gather_output=False, **shared)
        self.down = RowParallelLinear(hidden, features, input_is_parallel=True, skip_bias_add=False, **shared)
        self.head = torch.nn.Linear(features, 1, dtype=config.params_dtype)

    def set_input_tensor(self, tensor: torch.Tensor) -> None:
        """Nothing here: there is no pipeline."""

    def forward(self, samples: Samples) -> torch.Tensor:
        """Return the squared error of each sample, float32 [N]."""
        hidden = torch.nn.functional.gelu(self.up(samples.values[:, None].to(self.head.weight.dtype))[0])
        states = torch.nn.functional.dropout(self.down(hidden)[0], self.config.hidden_dropout, self.training)
        each = self.head(states).flatten().float()
        predicted = torch.zeros_like(samples.targets).index_add(0, samples.sample, each)
        return (predicted - samples.targets).square()
