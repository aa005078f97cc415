# SPDX-License-Identifier: Apache-2.0
"""The one way in which Megacell compiles a loop."""

from collections.abc import Callable
from typing import Any, TypeVar

from numba import njit

Function = TypeVar("Function", bound=Callable[..., Any])


def compiled(function: Function) -> Function:
    """Compile a function with numba, when it is first called.

    nogil: a thread may prepare batches while another trains. cache: compiled once a machine. numpy's error model:
    division has no branch for zero, so that loops vectorise. Never fastmath: results are the same on every platform.
    """
    made: Function = njit(nogil=True, cache=True, error_model="numpy")(function)
    return made


def inlined(function: Function) -> Function:
    """Compile a function as `compiled` does, into the body of each caller: a loop around it can be vectorised then."""
    made: Function = njit(nogil=True, cache=True, error_model="numpy", inline="always")(function)
    return made
