# SPDX-License-Identifier: Apache-2.0
"""A command tried in a fork of a process that has imported everything: watched, hit, waited for, and looked at.

The process that forks (`zygote.py`) adopts what a killed command leaves running, so nothing of a try escapes it.
"""

import atexit
import contextlib
import ctypes
import json
import os
import re
import signal
import sys
import threading
import time
import traceback
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from shim import Order, Page, Seen

LEFT_RUNNING = 30.0  # seconds within which what a killed command started has to end by itself
STOPPED = 0.2  # seconds that a stopped command stands still before it is killed
POLL = 0.004
_SWALLOWED = re.compile(r"^Exception ignored in: .*\nTraceback (.*\n)+?KeyboardInterrupt.*\n", re.M)  # in a __del__
_SUBREAPER = 36  # PR_SET_CHILD_SUBREAPER of prctl


@dataclass(frozen=True)
class Ended:
    """How a command ended.

    Attributes
    ----------
    code : int or None
        Exit code, below zero a signal's number; None where it did not end in time.
    out, err : str
    seconds : float
    seen : Seen
    hit : bool
        A call was hit, or a signal met a living process.
    """

    code: int | None
    out: str
    err: str
    seconds: float
    seen: Seen
    hit: bool

    def complaint(self) -> str:
        """Return what no end of a command may show, "" if nothing."""
        if self.code is None:
            return "it hung"
        err = _SWALLOWED.sub("", self.err)
        if err.rstrip().endswith("KeyboardInterrupt") and "args.run(" not in err:
            return ""  # Ctrl-C while the interpreter was still starting
        for text in ("Traceback (most", "internal error"):
            if text in self.out + err:
                return f"{text}: {err.strip()[-600:]}"
        return "exit code 70" if self.code == 70 else ""


class Tries:
    """Runs commands in forks of this process.

    Parameters
    ----------
    folder : Path
        For what the commands print.
    page : Page
        Of the shim that is loaded here.
    """

    def __init__(self, folder: Path, page: Page):
        self.page, self._out, self._err, self._answer = page, folder / "out", folder / "err", folder / "answer"
        ctypes.CDLL(None).prctl(_SUBREAPER, 1, 0, 0, 0)

    def command(
        self, work: Callable[[], int], folder: Path, order: Order, *, limit: float, signal_after: float | None = None
    ) -> Ended:
        """Run a command in a folder; the order is carried out at one of its calls, or so many seconds after its start.

        Parameters
        ----------
        work : callable
            Returns the exit code.
        folder : Path
            Where it runs, and below which its calls count.
        order : Order
        limit : float
            Seconds within which it has to end by itself.
        signal_after : float, optional
            Send the order's signal at this time instead of at a call.
        """
        self.page.arm(folder, order if signal_after is None else Order())
        begun = time.monotonic()
        child = self._fork(lambda: self._as_command(work, folder))
        with contextlib.suppress(PermissionError, ProcessLookupError):  # it does the same: whoever comes first
            os.setpgid(child, child)
        code, signalled = self._wait(child, begun, limit, order, signal_after)
        self.page.disarm()
        seen = self.page.seen()
        out, err = (path.read_text(errors="replace") for path in (self._out, self._err))
        return Ended(code, out, err, time.monotonic() - begun, seen, bool(seen.hits) or signalled)

    def ask(self, question: Callable[[], object], *, limit: float = 120.0) -> object:
        """Return what a function returns in a fork, as JSON; what it raised, as a text that begins with "error: "."""
        self._answer.unlink(missing_ok=True)

        def answer() -> int:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, 1)
            os.dup2(nowhere, 2)
            try:
                found = question()
            except BaseException as error:
                found = f"error: {type(error).__name__}: {error}"[:600]
            self._answer.write_text(json.dumps(found))
            return 0

        code, _ = self._wait(self._fork(answer), time.monotonic(), limit, Order(), None)
        return json.loads(self._answer.read_text()) if code == 0 else f"error: looking at it ended with {code}"

    def leftovers(self) -> str:
        """Wait for what commands have left running; return a complaint if it does not end by itself."""
        deadline = time.monotonic() + LEFT_RUNNING
        while running := _living():
            if time.monotonic() > deadline:
                names = [_command_of(process) for process in running]
                _kill_all()
                return f"still running {LEFT_RUNNING:.0f} s after its end: {names}"
            time.sleep(POLL)
        return ""

    def _fork(self, work: Callable[[], int]) -> int:
        sys.stdout.flush()
        sys.stderr.flush()
        child = os.fork()
        if child == 0:
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            end_with(work)
        return child

    def _as_command(self, work: Callable[[], int], folder: Path) -> int:
        """Make this process what `python -m megacell` is, and do the work."""
        os.setpgid(0, 0)
        self.page.set_main()
        for path, number in ((self._out, 1), (self._err, 2)):
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        os.chdir(folder)
        os.environ["MEGACELL_CACHE"] = str(folder / "cache")
        sys.modules["__main__"] = types.ModuleType("__main__")  # what it starts does not import the harness
        signal.signal(signal.SIGINT, signal.default_int_handler)
        code = work()
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        return code

    def _wait(
        self, child: int, begun: float, limit: float, order: Order, signal_after: float | None
    ) -> tuple[int | None, bool]:
        """Wait for a child; return its exit code, and whether it was there to get the signal."""
        signalled = False
        while True:
            done, status = os.waitpid(child, os.WNOHANG | os.WUNTRACED)
            if done and os.WIFSTOPPED(status):
                time.sleep(STOPPED)
                _kill_all()
            elif done:
                return os.waitstatus_to_exitcode(status), signalled
            now = time.monotonic() - begun
            if now > limit:
                _kill_all()
                os.waitpid(child, 0)
                return None, signalled
            if signal_after is not None and now >= signal_after and not signalled and order.number:
                signalled = True
                (os.kill if order.who == "parent" else os.killpg)(child, order.number)
            time.sleep(POLL)


def end_with(work: Callable[[], int]) -> None:
    """Do the work and end this process with its exit code, as the interpreter ends: threads, then exit functions."""
    code = 99
    try:
        code = int(work() or 0)
        threading._shutdown()
        atexit._run_exitfuncs()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def _living() -> list[int]:
    """Return the processes below this one, after taking leave of its children that ended."""
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    return list(_descendants(os.getpid()))


def _kill_all() -> None:
    """Kill all processes below this one, listed before the first of them dies and leaves its children to us."""
    for process in list(_descendants(os.getpid())):
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)


def _descendants(process: int) -> Iterator[int]:
    with contextlib.suppress(OSError):
        for thread in Path(f"/proc/{process}/task").iterdir():
            for child in (thread / "children").read_text().split():
                yield int(child)
                yield from _descendants(int(child))


def _command_of(process: int) -> str:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{process}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
    return str(process)
