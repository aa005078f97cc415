# SPDX-License-Identifier: Apache-2.0
"""What a network's tensors are called here, and the check that those of a file are they."""

from collections.abc import Iterator, Mapping

import torch

from megacell.geneformer.model.config import ModelConfig
from megacell.store.errors import DataError

WORDS, POSITIONS = "embedding.word_embeddings.weight", "embedding.position_embeddings.weight"
BIAS, DECODER = "output_layer.bias", "output_layer.weight"

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)  # of weights: 8 bits need scales beside them

State = Mapping[str, torch.Tensor]
Weights = Iterator[tuple[str, torch.Tensor]]  # checked, whole, by our names, each made when it is its turn
Shapes = dict[str, tuple[int, ...]]


def shapes_of(network: ModelConfig, rows: int) -> Shapes:
    """Return the shape of each of our tensors, whole, for an embedding of so many rows."""
    hidden, ffn = network.hidden, network.ffn
    shapes: Shapes = {WORDS: (rows, hidden), POSITIONS: (network.max_length, hidden), BIAS: (rows,)}
    if not network.tied_head:
        shapes[DECODER] = (rows, hidden)
    norms, matrices = ["encoder.final_layernorm", "lm_head.layer_norm"], {"lm_head.dense": (hidden, hidden)}
    for layer in (f"encoder.layers.{i}." for i in range(network.layers)):
        norms += [f"{layer}input_layernorm", f"{layer}pre_mlp_layernorm"]
        matrices |= {
            f"{layer}self_attention.linear_qkv": (3 * hidden, hidden),
            f"{layer}self_attention.linear_proj": (hidden, hidden),
            f"{layer}mlp.linear_fc1": (ffn, hidden),
            f"{layer}mlp.linear_fc2": (hidden, ffn),
        }
    for name in norms:
        shapes |= {f"{name}.weight": (hidden,), f"{name}.bias": (hidden,)}
    for name, shape in matrices.items():
        shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    return shapes


def check_tensors(state: State, shapes: Shapes, place: str, config: str, unused: tuple[str, ...] = ()) -> None:
    """Refuse tensors that are missing, unknown, of another shape or kind, or not finite.

    Parameters
    ----------
    state : mapping of Tensor
        Of which one at a time is asked for.
    shapes : dict
        What has to be there.
    place, config : str
        The file, and the one beside the tensors that the shapes follow from, for messages.
    unused : tuple of str
        How the names of others begin that may be there, and are not looked at.

    Raises
    ------
    DataError
    """
    unknown = {name for name in set(state) - set(shapes) if not name.startswith(unused)}
    for names, what in ((set(shapes) - set(state), "missing"), (unknown, "unknown")):
        if names:
            first = sorted(names)[0]
            mend = "give the pretrained model, whole"
            raise DataError(f"{place}: {len(names)} tensors are {what} for its {config} ({first}, …); {mend}")
    for name, shape in shapes.items():
        tensor = state[name]
        if tuple(tensor.shape) != shape:
            raise DataError(
                f"{place}: {name} is {tuple(tensor.shape)}, {config} and vocabulary say {shape}; they are no pair"
            )
        if tensor.dtype not in DTYPES or tensor.layout is not torch.strided:
            kind = str(tensor.dtype).removeprefix("torch.")
            raise DataError(f"{place}: {name} holds {kind}, where weights should be; give them in 16 or 32 bits")
        if not all(map(torch.isfinite, tensor.aminmax())):  # takes no memory, unlike a mask
            raise DataError(f"{place}: {name} holds NaN or infinite values; fetch it again")
