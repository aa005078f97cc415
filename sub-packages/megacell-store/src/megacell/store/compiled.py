# SPDX-License-Identifier: Apache-2.0
"""How loops over rows and values are compiled: once, cached on disk, without Python's global lock."""

from collections.abc import Callable
from typing import TypeVar, cast

import numba

Function = TypeVar("Function", bound=Callable[..., object])


def compiled(function: Function) -> Function:
    """Compile a function with numba; it must be free of Python objects."""
    return cast(Function, numba.njit(nogil=True, cache=True)(function))
