# SPDX-License-Identifier: Apache-2.0
"""Initial weights, keyed by (seed, global parameter name): the same for every tensor parallel size."""

import hashlib
from collections.abc import Iterable, Mapping

import torch
from megatron.core import parallel_state

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
    rank: int = parallel_state.get_tensor_model_parallel_rank()
    return whole.chunk(parts, dim=cut)[rank]


def initialise(
    network: torch.nn.Module,
    seed: int,
    std: float,
    output_scale: float = 1.0,
    special: Mapping[str, torch.Tensor] | None = None,
) -> None:
    """Fill every parameter in place: biases with 0, norms with 1, matrices from a normal distribution.

    Parameters
    ----------
    network : Module
        Its parameters may be parts of larger ones, by tensor parallelism.
    seed : int
    std : float
        Standard deviation of matrices and embeddings.
    output_scale : float
        By which that of the output projections (`SCALED`) is multiplied.
    special : mapping of Tensor, optional
        Whole tensors for parameters that start as something else, by name.
    """
    special = special or {}
    for name, parameter in network.named_parameters():
        shape = _whole_shape(parameter)
        if name in special:
            whole = special[name]
        elif name.endswith(".bias"):
            whole = torch.zeros(shape)
        elif "layernorm" in name or "layer_norm" in name:
            whole = torch.ones(shape)
        else:
            key = hashlib.sha256(f"{seed}:{name}".encode()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(key[:8], "little", signed=True))
            scale = output_scale if name.endswith(SCALED) else 1.0
            whole = torch.empty(shape).normal_(0.0, std * scale, generator=generator)
        with torch.no_grad():
            parameter.copy_(_own_part(parameter, whole))


def allocate(network: torch.nn.Module) -> None:
    """Give every parameter that was made on the meta device memory on the CPU, all zeros, in place."""
    for parameter in network.parameters():
        here = torch.nn.Parameter(torch.zeros_like(parameter, device="cpu"), parameter.requires_grad)
        here.__dict__.update(parameter.__dict__)  # how it is cut, among other things
        torch.utils.swap_tensors(parameter, here)


def copy_whole(network: torch.nn.Module, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
    """Copy whole (uncut) weights into this rank's part of the network, in place, one after the other.

    Raises
    ------
    KeyError
        For names that are not those of the network: an unknown one, or at the end one that did not come.
    """
    parameters = dict(network.named_parameters())
    with torch.no_grad():
        for name, whole in weights:
            parameter = parameters.pop(name)
            parameter.copy_(_own_part(parameter, whole))
    if parameters:
        raise KeyError(f"no weights for {', '.join(sorted(parameters))}")
