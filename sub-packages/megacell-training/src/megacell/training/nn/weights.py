# SPDX-License-Identifier: Apache-2.0
"""Initial weights, keyed by (seed, global parameter name): the same for every tensor parallel size."""

import hashlib
import math
from collections.abc import Iterable

import torch
from megatron.core import parallel_state

from megacell.geneformer.model.config import ModelConfig

PADDING_BIAS = -1e4  # keeps the padded rows of the vocabulary out of every softmax; their gradient is exactly zero
SCALED = ("linear_proj.weight", "linear_fc2.weight")  # output projections


def _cut(parameter: torch.nn.Parameter) -> int | None:
    """Return the dimension that tensor parallel ranks share out, None for a parameter that each has whole."""
    return getattr(parameter, "partition_dim", None) if getattr(parameter, "tensor_model_parallel", False) else None


def _whole_shape(parameter: torch.nn.Parameter) -> tuple[int, ...]:
    shape = list(parameter.shape)
    if (cut := _cut(parameter)) is not None:
        shape[cut] *= parallel_state.get_tensor_model_parallel_world_size()
    return tuple(shape)


def _own_part(parameter: torch.nn.Parameter, whole: torch.Tensor) -> torch.Tensor:
    if (cut := _cut(parameter)) is None:
        return whole
    parts = parallel_state.get_tensor_model_parallel_world_size()
    return whole.chunk(parts, dim=cut)[parallel_state.get_tensor_model_parallel_rank()]


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
    for name, parameter in bert.named_parameters():
        shape = _whole_shape(parameter)
        if name == "output_layer.bias":
            whole = torch.full(shape, PADDING_BIAS)
            whole[: model.vocabulary_size] = 0.0 if head_bias is None else head_bias
        elif name.endswith(".bias"):
            whole = torch.zeros(shape)
        elif "layernorm" in name or "layer_norm" in name:
            whole = torch.ones(shape)
        else:
            key = hashlib.sha256(f"{seed}:{name}".encode()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(key[:8], "little", signed=True))
            scale = 1 / math.sqrt(2 * model.layers) if model.scaled_init and name.endswith(SCALED) else 1.0
            whole = torch.empty(shape).normal_(0.0, model.init_std * scale, generator=generator)
        with torch.no_grad():
            parameter.copy_(_own_part(parameter, whole))


def allocate(bert: torch.nn.Module) -> None:
    """Give every parameter that was made on the meta device memory on the CPU, all zeros, in place."""
    for parameter in bert.parameters():
        here = torch.nn.Parameter(torch.zeros_like(parameter, device="cpu"), parameter.requires_grad)
        here.__dict__.update(parameter.__dict__)  # how it is cut, among other things
        torch.utils.swap_tensors(parameter, here)


def copy_whole(bert: torch.nn.Module, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
    """Copy whole (uncut) weights into this rank's part of the network, in place, one after the other.

    Raises
    ------
    KeyError
        For names that are not those of the network: an unknown one, or at the end one that did not come.
    """
    parameters = dict(bert.named_parameters())
    with torch.no_grad():
        for name, whole in weights:
            parameter = parameters.pop(name)
            parameter.copy_(_own_part(parameter, whole))
    if parameters:
        raise KeyError(f"no weights for {', '.join(sorted(parameters))}")
