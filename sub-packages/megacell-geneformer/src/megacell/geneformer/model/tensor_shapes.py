# SPDX-License-Identifier: Apache-2.0
"""What a network's tensors are called here, and the check that those of a file are they."""

import math
from pathlib import Path

from megacell.core.errors import DataError
from megacell.geneformer.model.config import ModelConfig
from megacell.training.interchange.tensors import Shapes

WORDS, POSITIONS = "embedding.word_embeddings.weight", "embedding.position_embeddings.weight"
BIAS, DECODER = "output_layer.bias", "output_layer.weight"
LEAST_BYTES = 2  # of a weight


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


def check_stored(network: ModelConfig, checkpoint: Path) -> None:
    """Refuse a checkpoint whose files are too small for its network, before memory is taken for that.

    Raises
    ------
    DataError
    """
    needed = LEAST_BYTES * sum(math.prod(shape) for shape in shapes_of(network, network.padded_vocabulary).values())
    stored = sum(file.stat().st_size for file in checkpoint.glob("*.distcp"))
    if stored < needed:
        raise DataError(
            f"{checkpoint}: says that its network has {needed:,} bytes or more, but holds {stored:,}; take another"
        )
