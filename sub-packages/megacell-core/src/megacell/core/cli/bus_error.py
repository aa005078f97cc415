# SPDX-License-Identifier: Apache-2.0
"""One line where a file is cut short while it is mapped: the system ends a process that reads what is gone.

It sends SIGBUS within the reading instruction, so no exception can be raised. The handler only writes and exits.
"""

import ctypes
import os
import signal
import sys
from typing import Any

EXIT = 1
_WITH_ADDRESS, _ONCE = 4, 0x80000000  # SA_SIGINFO, SA_RESETHAND
_ADDRESS_AT = 16  # bytes before si_addr in Linux' siginfo_t of 64 bits
_kept: list[Any] = []  # the handler, which the system knows only by its address


class _Action(ctypes.Structure):
    """``struct sigaction`` of Linux' C libraries on 64 bits."""

    _fields_ = (
        ("handler", ctypes.c_void_p),
        ("mask", ctypes.c_ubyte * 128),
        ("flags", ctypes.c_int),
        ("restorer", ctypes.c_void_p),
    )


def explain_bus_errors(command: str) -> None:
    """From now on, end this process with a line that names the mapped file that was cut short.

    Parameters
    ----------
    command : str
        Of `megacell`, for the line.
    """
    if sys.platform != "linux" or ctypes.sizeof(ctypes.c_void_p) != 8 or _kept:
        return

    def handle(_signal: int, information: int, _context: int) -> None:
        address = ctypes.c_uint64.from_address(information + _ADDRESS_AT).value
        fix = "restore it; of a store, run `megacell verify`"
        line = f"megacell {command}: error: {_mapped_at(address)} was cut short, or its disk failed, while it was read"
        os.write(2, f"{line}; {fix}\n".encode(errors="backslashreplace"))
        os._exit(EXIT)

    handler = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p)(handle)
    action = _Action(handler=ctypes.cast(handler, ctypes.c_void_p), flags=ctypes.c_int32(_WITH_ADDRESS | _ONCE).value)
    if ctypes.CDLL(None).sigaction(int(signal.SIGBUS), ctypes.byref(action), None) == 0:
        _kept.append(handler)


def _mapped_at(address: int) -> str:
    """Return the file that is mapped at an address of this process."""
    try:
        with open("/proc/self/maps", encoding="utf-8", errors="surrogateescape") as maps:
            for line in maps:
                first, _, last = line.split(maxsplit=1)[0].partition("-")
                if int(first, 16) <= address < int(last, 16):
                    return "".join(c for c in line.split(maxsplit=5)[5].strip() if c.isprintable())
    except (OSError, ValueError, IndexError):
        pass
    return "a mapped file"
