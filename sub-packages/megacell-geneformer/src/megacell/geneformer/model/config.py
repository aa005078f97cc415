# SPDX-License-Identifier: Apache-2.0
"""What a Geneformer network is made of, and its translation into Megatron-core's configuration."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from megacell.core.errors import UsageError
from megacell.geneformer.vocabulary.vocabulary import MOST_TOKENS
from megacell.training.foreign.plain import SHOWN, shown
from megacell.training.nn.layout import Layout

VOCABULARY_MULTIPLE = 128  # the embedding's rows are padded to it, whatever the tensor parallel size
NORMS = ("pre", "post")
ACTIVATIONS = ("gelu", "relu", "gelu_tanh")
FREE = ("hidden_dropout", "attention_dropout", "init_std", "scaled_init")  # may change when training goes on
LARGEST = {  # sizes beyond any model's: what a file from anybody says is looked at before anything is made
    "layers": 1000,
    "hidden": 1 << 16,
    "ffn": 1 << 18,
    "heads": 1 << 12,
    "max_length": 1 << 20,
    "vocabulary_size": MOST_TOKENS,
}


@dataclass(frozen=True)
class ModelConfig:
    """Sizes and options of one network; nothing here depends on how it is trained or spread over ranks.

    Parameters
    ----------
    layers, hidden, ffn, heads : int
        Depth, width, width of the feed-forward layer, attention heads.
    max_length : int
        Most tokens of one cell, specials included; also the number of learned positions.
    vocabulary_size : int
        Tokens of the vocabulary, specials included, before padding.
    norm : {"pre", "post"}
        Where LayerNorm stands: before attention and feed-forward layer (Megatron's BERT), or after the residual
        sums and after the embeddings (the BERT of Hugging Face's Geneformers).
    activation : {"gelu", "relu", "gelu_tanh"}
        Of the feed-forward layers and of the LM head; GELU is the exact one. "gelu_tanh" is what NeMo 1 computed:
        the approximation by tanh in the feed-forward layers, the exact one in the head.
    tied_head : bool
        The LM head's decoder is the token embedding; else a matrix of its own.
    hidden_dropout, attention_dropout : float
    layernorm_epsilon : float
    init_std : float
        Standard deviation of the normal weights at the start.
    scaled_init : bool
        Divide it by sqrt(2 layers) for the output projections, as Megatron does; else it is one for all, as in BERT.

    Raises
    ------
    UsageError
        Where the sizes do not fit each other.
    """

    layers: int
    hidden: int
    ffn: int
    heads: int
    max_length: int
    vocabulary_size: int
    norm: str
    activation: str
    tied_head: bool
    hidden_dropout: float
    attention_dropout: float
    layernorm_epsilon: float
    init_std: float
    scaled_init: bool

    def __post_init__(self) -> None:
        for name, most in LARGEST.items():
            if type(value := getattr(self, name)) is not int or not 1 <= value <= most:
                raise UsageError(f"model.{name}={_told(value)}: must be a whole number from 1 to {most:,}")
        for name in ("hidden_dropout", "attention_dropout", "layernorm_epsilon", "init_std"):
            if type(value := getattr(self, name)) not in (int, float) or not 0 <= value < math.inf:
                raise UsageError(f"model.{name}={_told(value)}: must be a number of at least 0")
        for name, choices in (("norm", NORMS), ("activation", ACTIVATIONS)):
            if (value := getattr(self, name)) not in choices:
                raise UsageError(f"model.{name}={_told(value)}: choose one of {', '.join(choices)}")
        for name in ("tied_head", "scaled_init"):
            if not isinstance(value := getattr(self, name), bool):
                raise UsageError(f"model.{name}={_told(value)}: must be true or false")
        if self.hidden % self.heads:
            raise UsageError(f"model.hidden={self.hidden} does not divide into model.heads={self.heads}: change one")
        if not 0 <= self.hidden_dropout < 1 or not 0 <= self.attention_dropout < 1:
            raise UsageError("model.hidden_dropout and model.attention_dropout lie in [0, 1)")

    @classmethod
    def of(cls, values: dict[str, Any]) -> "ModelConfig":
        """Make one from a mapping, and refuse what is missing or unknown by name."""
        known = {f.name for f in fields(cls)}
        if not isinstance(values, Mapping):
            raise UsageError(f"model: is {shown(values)}, where options are expected")
        if unknown := [shown(name) for name in values if name not in known]:
            raise UsageError(f"model: unknown option(s) {', '.join(unknown[:5])}; known are {', '.join(sorted(known))}")
        if missing := sorted(known - set(values)):
            raise UsageError(f"model: option(s) not given: {', '.join(missing)}")
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, for YAML and JSON."""
        return asdict(self)

    def differing(self, other: "ModelConfig") -> list[str]:
        """Return the names of the options by which weights of one do not fit the other."""
        theirs = other.to_dict()
        return [name for name, value in self.to_dict().items() if name not in FREE and theirs[name] != value]

    @property
    def padded_vocabulary(self) -> int:
        """Rows of the embedding: the vocabulary rounded up to a multiple of 128."""
        return -(-self.vocabulary_size // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE

    def check_parallel(self, tensor: int) -> None:
        """Raise UsageError if the network cannot be cut into ``tensor`` parallel parts."""
        for name, size in (("heads", self.heads), ("ffn", self.ffn), ("vocabulary", self.padded_vocabulary)):
            if tensor < 1 or size % tensor:
                raise UsageError(
                    f"parallel.tensor={tensor} does not divide the model's {name} ({size}): choose another"
                )


def _told(value: Any) -> str:
    """Return an option's value as it is typed, cut short."""
    return value[:SHOWN] if isinstance(value, str) else shown(value)


def _gelu_tanh(x):
    import torch

    return torch.nn.functional.gelu(x, approximate="tanh")


def megatron_config(model: ModelConfig, layout: Layout):
    """Translate into Megatron-core's ``TransformerConfig``."""
    import torch
    from megatron.core.transformer import TransformerConfig

    config = TransformerConfig(
        num_layers=model.layers,
        hidden_size=model.hidden,
        ffn_hidden_size=model.ffn,
        num_attention_heads=model.heads,
        hidden_dropout=model.hidden_dropout,
        attention_dropout=model.attention_dropout,
        layernorm_epsilon=model.layernorm_epsilon,
        activation_func=_gelu_tanh
        if model.activation == "gelu_tanh"
        else getattr(torch.nn.functional, model.activation),
        **layout.megatron_options(),
    )
    config.attention, config.compiled = layout.attention, layout.compiled  # for the parts that are our own
    return config
