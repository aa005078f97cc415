# SPDX-License-Identifier: Apache-2.0
"""Where a Geneformer's weights start."""

import math

import torch

from megacell.geneformer.model.config import ModelConfig
from megacell.training.nn import weights

PADDING_BIAS = -1e4  # keeps the padded rows of the vocabulary out of every softmax; their gradient is exactly zero


def initialise(bert: torch.nn.Module, model: ModelConfig, seed: int, head_bias: torch.Tensor | None = None) -> None:
    """Fill every parameter in place.

    Parameters
    ----------
    bert : PackedBert
    model : ModelConfig
    seed : int
    head_bias : float tensor [vocabulary_size], optional
        Where the LM head's bias starts: the log of the genes' frequencies, so that the first loss is that of
        the frequency baseline and not log(vocabulary). Zeros without it.
    """
    bias = torch.full((model.padded_vocabulary,), PADDING_BIAS)
    bias[: model.vocabulary_size] = 0.0 if head_bias is None else head_bias
    output_scale = 1 / math.sqrt(2 * model.layers) if model.scaled_init else 1.0
    weights.initialise(bert, seed, model.init_std, output_scale, {"output_layer.bias": bias})
