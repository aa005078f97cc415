# SPDX-License-Identifier: Apache-2.0
"""NumPy's vectorised sort, called from inside a compiled loop.

A compiled loop's own sort is four times slower, and calling ``array.sort()`` from Python takes the interpreter's lock
for each cell, so that two threads are little faster than one. NumPy publishes the function in its C interface
(``PyArray_ArrFuncs.sort``, at an unchanged place throughout NumPy 2); where it is not to be had, the compiled sort
stands in: the same result, later.
"""

import ctypes
from functools import cache
from typing import Any

import numpy as np
from llvmlite import ir  # type: ignore[import-untyped]
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from megacell.core.jit import compiled

_GET_ARRAY_FUNCTIONS = 365  # PyArray_API[365]: _PyDataType_GetArrFuncs, of NumPy's __multiarray_api.h
_NDARRAY_C_VERSION = 0  # PyArray_API[0]
_NUMPY_2 = 0x02000000  # the binary interface of all releases of NumPy 2
_QUICKSORT = 21 + 12  # pointers before sort[NPY_QUICKSORT] in PyArray_ArrFuncs: 21 casts, 12 functions


@cache
def sort_address(dtype: type = np.uint64) -> int:
    """Return where NumPy's sort of a type lies in memory, 0 where NumPy does not say."""
    table_of = ctypes.pythonapi.PyCapsule_GetPointer
    table_of.restype, table_of.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
    try:
        capsule = np._core.multiarray._ARRAY_API  # type: ignore[attr-defined]
    except AttributeError:
        return 0
    table = ctypes.cast(table_of(capsule, None), ctypes.POINTER(ctypes.c_void_p))
    version = ctypes.PYFUNCTYPE(ctypes.c_uint)(table[_NDARRAY_C_VERSION] or 0)()
    if version != _NUMPY_2:
        return 0
    functions_of = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.py_object)(table[_GET_ARRAY_FUNCTIONS] or 0)
    functions = ctypes.cast(functions_of(np.dtype(dtype)), ctypes.POINTER(ctypes.c_void_p))
    return functions[_QUICKSORT] or 0


def _call(_context: Any, address: Any, data: Any, n: Any) -> Any:
    """Return the code of a call of ``int sort(void *data, npy_intp n, void *unused)`` at an address."""
    signature = types.int32(types.int64, types.uintp, types.int64)

    def generate(_: Any, builder: Any, __: Any, arguments: Any) -> Any:
        pointer = cgutils.voidptr_t
        function = ir.FunctionType(ir.IntType(32), [pointer, ir.IntType(64), pointer])
        callee = builder.inttoptr(arguments[0], function.as_pointer())
        start = builder.inttoptr(arguments[1], pointer)
        return builder.call(callee, [start, arguments[2], ir.Constant(pointer, None)])

    return signature, generate


_call_sort: Any = intrinsic(_call)


@compiled
def sort_keys(keys: np.ndarray, address: int) -> None:
    """Sort contiguous keys [n] in place; ``address`` as `sort_address` gives it for their type."""
    if address == 0 or _call_sort(address, keys.ctypes.data, len(keys)) != 0:
        keys.sort()
