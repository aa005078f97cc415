# SPDX-License-Identifier: Apache-2.0
"""Element-wise operations of the network, each of which ``torch.compile`` makes one kernel where ``compile=true``.

Only these are compiled: between them stand matrix products and collectives, which gain nothing, and attention over each
cell. The number of tokens is a symbol in a kernel, so that packs of all sizes share it.
"""

import importlib.util
import os
import shutil
import sys
import sysconfig
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.nn.functional as F

from megacell.core.errors import UsageError

Returned = TypeVar("Returned")


def bias_activation(
    values: torch.Tensor, bias: torch.Tensor | None, activation: Callable[[torch.Tensor], torch.Tensor]
) -> torch.Tensor:
    """Return the activation of values + bias; None for a bias that was added already."""
    return activation(_sum(values, bias))


def bias_dropout_sum(
    values: torch.Tensor, bias: torch.Tensor | None, residual: torch.Tensor, rate: float
) -> torch.Tensor:
    """Return what dropout leaves of values + bias, on top of the residual."""
    return residual + F.dropout(_sum(values, bias), rate)


def bias_dropout_sum_norm(
    values: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor,
    rate: float,
    weight: torch.Tensor,
    shift: torch.Tensor,
    epsilon: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return `bias_dropout_sum` and its LayerNorm."""
    summed = bias_dropout_sum(values, bias, residual, rate)
    return summed, F.layer_norm(summed, weight.shape, weight, shift, epsilon)


def _sum(values: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return values if bias is None else values + bias


def sum_of_exponentials(logits: torch.Tensor, top: torch.Tensor) -> torch.Tensor:
    """Return the sum of exp(logits - top) over each row, in float32."""
    return (logits.float() - top[:, None]).exp_().sum(1)


def write_gradient(
    logits: torch.Tensor, label: torch.Tensor, here: torch.Tensor, normaliser: torch.Tensor, factor: torch.Tensor
) -> None:
    """Write the gradient of cross-entropy over a block of logits; all but these are of one value a row."""
    label, here, normaliser, factor = (values[:, None] for values in (label, here, normaliser, factor))
    share = (logits.float() - normaliser).exp_().scatter_add_(1, label, -here)
    logits.copy_(share.mul_(factor))


@cache
def _compiled(operation: Callable[..., Any]) -> Callable[..., Any]:
    """Compile, once a process.

    On a CPU torch's own generator draws the dropout, as it does without compiling: the kernel's own is slower there.
    Should more graphs be needed than torch allows, it goes on without compiling, and says so: no run ends of it.
    """
    options: dict[str, Any] = {
        "fallback_random": not torch.cuda.is_available(),
        "compile_threads": 1,
        "deterministic": torch.are_deterministic_algorithms_enabled(),  # else variants are timed, and sum differently
    }
    return torch.compile(operation, dynamic=True, options=options)


def fused(operation: Callable[..., Returned], compiled: bool) -> Callable[..., Returned]:
    """Return one of the operations above, compiled if asked for."""
    return _compiled(operation) if compiled else operation


def missing_to_compile() -> str | None:
    """Name what ``torch.compile`` would need on this machine and has not; None where it has all."""
    if torch.cuda.is_available():
        if importlib.util.find_spec("triton") is None:
            return "Triton (pip install triton)"
        known = [os.environ["CC"]] if "CC" in os.environ else ["gcc", "clang", "cc"]
        return None if any(map(shutil.which, known)) else "a C compiler (gcc)"
    compiler = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")
    if not shutil.which(compiler):
        return f"a C++ compiler ({compiler})"
    headers = Path(sysconfig.get_path("include"), "Python.h")
    return None if headers.is_file() else f"Python's headers ({headers}, of python3-dev)"


def check_compiler() -> None:
    """Raise UsageError if ``compile=true`` cannot be had on this machine."""
    if missing := missing_to_compile():
        raise UsageError(f"compile=true: torch.compile needs {missing}: install it, or leave compile=true out")
