# SPDX-License-Identifier: Apache-2.0
"""What a Geneformer network is made of, and its translation into Megatron-core's configuration."""

from dataclasses import asdict, dataclass, fields
from typing import Any

from megacell.store.errors import UsageError

VOCABULARY_MULTIPLE = 128  # the embedding's rows are padded to it, whatever the tensor parallel size
PRECISIONS = ("fp32", "bf16")


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
    hidden_dropout, attention_dropout : float
    layernorm_epsilon : float
    init_std : float
        Standard deviation of the normal weights at the start (output projections: divided by sqrt(2 layers)).

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
    hidden_dropout: float
    attention_dropout: float
    layernorm_epsilon: float
    init_std: float

    def __post_init__(self) -> None:
        for name in ("layers", "hidden", "ffn", "heads", "max_length", "vocabulary_size"):
            if not isinstance(value := getattr(self, name), int) or value < 1:
                raise UsageError(f"model.{name}={value}: must be a whole number of at least 1")
        for name in ("hidden_dropout", "attention_dropout", "layernorm_epsilon", "init_std"):
            if not isinstance(value := getattr(self, name), int | float):
                raise UsageError(f"model.{name}={value}: must be a number")
        if self.hidden % self.heads:
            raise UsageError(f"model.hidden={self.hidden} does not divide into model.heads={self.heads}: change one")
        if not 0 <= self.hidden_dropout < 1 or not 0 <= self.attention_dropout < 1:
            raise UsageError("model.hidden_dropout and model.attention_dropout lie in [0, 1)")

    @classmethod
    def of(cls, values: dict[str, Any]) -> "ModelConfig":
        """Make one from a mapping, and refuse what is missing or unknown by name."""
        known = {f.name for f in fields(cls)}
        if unknown := sorted(set(values) - known):
            raise UsageError(f"model: unknown option(s) {', '.join(unknown)}; known are {', '.join(sorted(known))}")
        if missing := sorted(known - set(values)):
            raise UsageError(f"model: option(s) not given: {', '.join(missing)}")
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, for YAML and JSON."""
        return asdict(self)

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


def megatron_config(model: ModelConfig, *, tensor_parallel: int = 1, precision: str = "fp32"):
    """Translate into Megatron-core's ``TransformerConfig``.

    Parameters
    ----------
    model : ModelConfig
    tensor_parallel : int
    precision : {"fp32", "bf16"}
        Of the parameters and activations; the optimizer's own copy is float32 in either case.
    """
    import torch
    from megatron.core.transformer import TransformerConfig

    if precision not in PRECISIONS:
        raise UsageError(f"precision={precision}: choose one of {', '.join(PRECISIONS)}")
    bf16 = precision == "bf16"
    return TransformerConfig(
        num_layers=model.layers,
        hidden_size=model.hidden,
        ffn_hidden_size=model.ffn,
        num_attention_heads=model.heads,
        hidden_dropout=model.hidden_dropout,
        attention_dropout=model.attention_dropout,
        layernorm_epsilon=model.layernorm_epsilon,
        init_method_std=model.init_std,
        activation_func=torch.nn.functional.gelu,
        tensor_model_parallel_size=tensor_parallel,
        bf16=bf16,
        params_dtype=torch.bfloat16 if bf16 else torch.float32,
        autocast_dtype=torch.bfloat16 if bf16 else torch.float32,
        use_cpu_initialization=True,
        perform_initialization=True,  # sets the tensor parallel attributes; model.init then fills the weights by name
        calculate_per_token_loss=True,
        gradient_accumulation_fusion=False,
        bias_dropout_fusion=False,
    )
