# SPDX-License-Identifier: Apache-2.0
"""faults.c as Python sees it: compiled, preloaded, and told through a page of memory what to do at which call."""

import errno
import mmap
import os
import signal
import struct
import subprocess
from dataclasses import dataclass
from pathlib import Path

CALLS = ("write", "sync", "rename", "link", "mkdir", "unlink", "allocate", "truncate", "open")  # as in faults.c
COUNT, FAIL, SIGNAL_ALL, SIGNAL_PARENT, SIGNAL_CALLER = range(5)
WHO = {"all": SIGNAL_ALL, "parent": SIGNAL_PARENT, "caller": SIGNAL_CALLER}
ERRORS = {"EIO": errno.EIO, "ENOSPC": errno.ENOSPC, "EROFS": errno.EROFS}
NAME = "HOSTILE_PAGE"  # in the environment: the page's file
_LAYOUT = struct.Struct(f"=8i2q{len(CALLS)}q1024s1024s")
_MAIN = struct.Struct("=5ii")  # up to and with the number of the command's first process


@dataclass(frozen=True)
class Order:
    """What is to happen at the ``at``-th call (from 1; 0: nothing) of some kinds that changes a file of the folder.

    Attributes
    ----------
    at : int
    calls : tuple of str
        Kinds of calls, of `CALLS`; all by default.
    error : str
        Of `ERRORS`: the call fails with it.
    sticky : bool
        All later ones fail too, as on a disk that stays full.
    number : signal.Signals, optional
        Sent instead, before the call or after it.
    who : str
        Who gets the signal: "all" (the command's process group), "parent" or "caller" (whoever makes the call).
    after : bool
    """

    at: int = 0
    calls: tuple[str, ...] = CALLS
    error: str = ""
    sticky: bool = False
    number: signal.Signals | None = None
    who: str = "all"
    after: bool = False

    def __str__(self) -> str:
        if self.error:
            return f"{self.error} at {'/'.join(self.calls)} {self.at}{' and all after it' * self.sticky}"
        name = self.number.name if self.number else "nothing"
        return f"{name} to {self.who} {'after' if self.after else 'before'} call {self.at}"


@dataclass(frozen=True)
class Seen:
    """What the shim has seen: calls of each kind below the folder, how many were hit, and the first one's path."""

    counts: dict[str, int]
    hits: int
    where: str


class Page:
    """The page of memory; ``arm`` before a command starts, ``seen`` after its end.

    Parameters
    ----------
    path : Path
        Its file, made where it is not there. A process maps the one that its environment names.
    """

    def __init__(self, path: Path):
        path.touch()
        with open(path, "r+b") as file:
            file.truncate(mmap.PAGESIZE)
            self._memory = mmap.mmap(file.fileno(), mmap.PAGESIZE)

    def arm(self, folder: Path, order: Order) -> None:
        """Count calls below a folder from here on, and do what is ordered."""
        action = FAIL if order.error else WHO[order.who] if order.number else COUNT
        value = ERRORS[order.error] if order.error else int(order.number or 0)
        bits = sum(1 << CALLS.index(call) for call in order.calls)
        numbers = (1, action, value, int(order.sticky), int(order.after), 0, 0, 0, order.at, bits, *[0] * len(CALLS))
        _LAYOUT.pack_into(self._memory, 0, *numbers, os.fsencode(folder), b"")

    def set_main(self) -> None:
        """Name this process as the command's first."""
        armed = _MAIN.unpack_from(self._memory)[:5]
        _MAIN.pack_into(self._memory, 0, *armed, os.getpid())

    def disarm(self) -> None:
        """Let all calls pass from here on."""
        struct.pack_into("=i", self._memory, 0, 0)

    def seen(self) -> Seen:
        """Return what was seen since it was armed."""
        fields = _LAYOUT.unpack_from(self._memory)
        counts = dict(zip(CALLS, fields[10 : 10 + len(CALLS)], strict=True))
        return Seen(counts, fields[6], fields[-1].rstrip(b"\0").decode(errors="replace"))


def build(folder: Path) -> Path:
    """Compile the shim into a folder; returns the library."""
    library = folder / "faults.so"
    source = Path(__file__).with_name("faults.c")
    subprocess.run(["gcc", "-shared", "-fPIC", "-O1", "-o", library, source, "-ldl"], check=True)
    return library


def environment(library: Path, page: Path) -> dict[str, str]:
    """Return the environment of a process in which the shim is loaded."""
    return {**os.environ, "LD_PRELOAD": str(library), NAME: str(page)}
