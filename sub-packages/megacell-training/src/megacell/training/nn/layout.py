# SPDX-License-Identifier: Apache-2.0
"""How a network is laid out over ranks, in which precision, and with which kernels."""

from dataclasses import dataclass
from typing import Any

from megacell.core.errors import UsageError

PRECISIONS = ("fp32", "bf16", "fp16")
RECOMPUTE = ("none", "selective", "full")
ATTENTIONS = ("auto", "sequences", "flash", "efficient", "cudnn", "padded", "transformer_engine")


@dataclass(frozen=True)
class Layout:
    """How a network is run; what it computes does not depend on it, but for rounding.

    Parameters
    ----------
    tensor : int
        Tensor parallel ranks that one copy is cut over.
    sequence : bool
        Between the cut layers each of these ranks works on its own part of the tokens; needs ``tensor`` above 1.
    recompute : {"none", "selective", "full"}
        What is computed again in the backward pass, to save memory: nothing, attention, or whole layers.
    precision : {"fp32", "bf16", "fp16"}
        Of parameters and activations; the optimizer's own copy is float32 in any case.
    attention : {"auto", "sequences", "flash", "efficient", "cudnn", "padded", "transformer_engine"}
        Which kernel attends within cells; "auto": an exact one, by device and precision.
    compiled : bool
        Make element-wise operations one kernel each, by ``torch.compile``.
    deterministic : bool
        Have Megatron take only operations that give the same bits every time.

    Raises
    ------
    UsageError
        For a value that is none of these.
    """

    tensor: int = 1
    sequence: bool = False
    recompute: str = "none"
    precision: str = "fp32"
    attention: str = "auto"
    compiled: bool = False
    deterministic: bool = False

    def __post_init__(self) -> None:
        if self.precision not in PRECISIONS:
            raise UsageError(f"precision={self.precision}: choose one of {', '.join(PRECISIONS)}")
        if self.recompute not in RECOMPUTE:
            raise UsageError(f"parallel.recompute={self.recompute}: choose one of {', '.join(RECOMPUTE)}")
        if self.attention not in ATTENTIONS:
            raise UsageError(f"attention={self.attention}: choose one of {', '.join(ATTENTIONS)}")
        for name, value in (("compile", self.compiled), ("deterministic", self.deterministic)):
            if not isinstance(value, bool):
                raise UsageError(f"{name}={value}: must be true or false")
        if self.sequence and self.tensor < 2:
            raise UsageError("sequence parallelism shares tokens among tensor parallel ranks, of which there is one")

    def megatron_options(self) -> dict[str, Any]:
        """Return the options of Megatron-core's ``TransformerConfig`` that follow from the layout."""
        import torch

        dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[self.precision]
        recompute: dict[str, dict[str, Any]] = {
            "none": {},
            "selective": {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]},
            "full": {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
        }
        return {
            "tensor_model_parallel_size": self.tensor,
            "sequence_parallel": self.sequence,
            "bf16": dtype is torch.bfloat16,
            "fp16": dtype is torch.float16,
            "params_dtype": dtype,
            "autocast_dtype": dtype,
            "use_cpu_initialization": True,
            "perform_initialization": True,  # sets the tensor parallel attributes; `nn.weights` then fills by name
            "init_method": torch.nn.init.zeros_,
            "output_layer_init_method": torch.nn.init.zeros_,
            "calculate_per_token_loss": True,
            "gradient_accumulation_fusion": False,
            "deterministic_mode": self.deterministic,
            **recompute[self.recompute],
        }
