# SPDX-License-Identifier: Apache-2.0
"""One writer at a time: a lock by exclusive creation, which network file systems honour where flock fails.

A lock is a small file beside or in what it stands for; it names the process that holds it. The lock of a process that
surely ended is taken over: on this machine, or in an earlier turn of the Slurm job that this process belongs to.
"""

import contextlib
import errno
import glob
import json
import os
import re
import secrets
import socket
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

from megacell.core.errors import DataError

NAME = ".lock"  # of a lock in a folder
LARGEST = 4096  # bytes of a lock


@contextmanager
def held(lock: Path, busy: str) -> Iterator[None]:
    """Hold a lock, whose folder exists; one whose process ended is taken over.

    Parameters
    ----------
    lock : Path
    busy : str
        What is locked, and what another process does there, for the message.

    Raises
    ------
    DataError
        Another process holds it, or one of another machine that cannot be asked; or it is no lock of ours.
    """
    mine = json.dumps({**_self(), "token": secrets.token_hex(8)}).encode()
    try:
        _take(lock, mine, busy)
    except OSError as error:
        raise DataError(f"{lock}: cannot be written ({error.strerror or error}); see to room and rights") from error
    try:
        _sweep(lock)
        yield
    finally:
        if lock.exists() and lock.read_bytes() == mine:
            lock.unlink()


def _take(lock: Path, mine: bytes, busy: str) -> None:
    try:
        _create(lock, mine)
    except FileExistsError:
        _take_over(lock, mine, busy)


def beside(path: Path) -> Path:
    """Return the place of the lock of a file or folder that is to be made."""
    whole = path.absolute()
    return whole.parent / f".{whole.name}{NAME}"


def forget(lock: Path) -> None:
    """Take a lock away whose process ended; any other stays."""
    if lock.exists():
        with contextlib.suppress(DataError), held(lock, "it"):
            pass


def is_held(lock: Path) -> bool:
    """Return whether a lock is there and its process may live."""
    return lock.exists() and _dead_token(lock) is None and lock.exists()


def _create(path: Path, content: bytes) -> None:
    """Create a file with its content in one step, written beside and then linked; FileExistsError if it is there.

    On a file system without links it is created exclusively and then filled; who meets it empty respects it.
    """
    temporary = _temporary(path)
    try:
        temporary.write_bytes(content)
        os.link(temporary, path)
    except FileNotFoundError:  # who has got the lock meanwhile has swept it away
        if not path.exists():
            raise
        raise FileExistsError(path) from None
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.ENOSYS):
            raise
        with open(path, "xb") as file:
            file.write(content)
    finally:
        temporary.unlink(missing_ok=True)


def _take_over(lock: Path, mine: bytes, busy: str) -> None:
    """Replace the lock of a dead process.

    Only who holds the claim, a file named after the dead lock's token, may replace it, so of several that find
    the same dead lock one wins. A claim is itself a lock, and that of a dead process is taken over likewise.
    """
    token = _dead_token(lock)
    if token is None:
        raise _refusal(lock, busy)
    claim = lock.with_name(f"{lock.name}-{token}.claim")
    _take(claim, mine, busy)
    try:
        if _dead_token(lock) != token:  # another one took it over, and let its claim go, since we looked
            raise _refusal(lock, busy)
        temporary = _temporary(lock)
        temporary.write_bytes(mine)
        os.replace(temporary, lock)
    finally:
        claim.unlink(missing_ok=True)


def _temporary(lock: Path) -> Path:
    return lock.with_name(f"{lock.name}-{secrets.token_hex(8)}")


def _sweep(lock: Path) -> None:
    """Take away what killed processes left on their way to a lock, which is held."""
    for path in lock.parent.glob(f"{glob.escape(lock.name)}-*"):
        if re.fullmatch(r"(-[0-9a-f]{1,32}(\.claim)?)+", path.name.removeprefix(lock.name)):
            path.unlink(missing_ok=True)


def _refusal(lock: Path, busy: str) -> DataError:
    """Return the error that names who holds a lock."""
    holder = ""
    try:
        theirs, since = _read(lock), datetime.fromtimestamp(lock.lstat().st_mtime)
        where = "".join(c for c in str(theirs["where"]).split()[0] if c.isprintable())[:80]
        holder = f" (process {int(theirs['pid'])} on {where}, since {since:%Y-%m-%d %H:%M})"
    except (OSError, ValueError, KeyError, TypeError, IndexError):  # let go meanwhile, or no lock of ours
        pass
    return DataError(f"{busy}{holder}; wait for it, or delete {lock} if that process no longer runs")


def _dead_token(lock: Path) -> str | None:
    """Return the token of a lock whose process surely ended; None if it may live, or let go meanwhile."""
    try:
        theirs = _read(lock)
        token = str(theirs["token"])
        if not _is_dead(theirs):
            return None
        if not re.fullmatch("[0-9a-f]{1,32}", token):  # it becomes part of a file's name
            raise ValueError("no token of ours")
        return token
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        raise DataError(f"{lock}: not a lock of ours; delete it if nothing is being written here") from None


def _read(lock: Path) -> dict[str, Any]:
    """Return what a lock says; ValueError for what is no small file with an object in it."""
    if not stat.S_ISREG(lock.lstat().st_mode):
        raise ValueError("no plain file")
    with open(lock, "rb") as file:
        content = json.loads(file.read(LARGEST))
    if not isinstance(content, dict):
        raise ValueError("no object")
    return content


def _self() -> dict[str, object]:
    """Say which process this is: a process number means nothing on another machine or in another container."""
    return {"where": _where(), "pid": os.getpid(), "started": _started(os.getpid()), **_slurm()}


def _where() -> str:
    try:
        namespace = os.readlink("/proc/self/ns/pid")
    except OSError:
        namespace = ""
    return f"{socket.gethostname()} {namespace}".strip()


def _slurm() -> dict[str, object]:
    """Say which Slurm job this is, and in which of its turns: a turn begins when those before it have ended."""
    if (job := os.environ.get("SLURM_JOB_ID")) is None:
        return {}
    turn = os.environ.get("SLURM_RESTART_COUNT", "0")
    cluster = os.environ.get("SLURM_CLUSTER_NAME", "")
    return {"job": f"{cluster} {job}".strip(), "turn": int(turn) if turn.isdecimal() else 0}


def _process(pid: int) -> tuple[str, str]:
    """Return a process' state and the time at which it started, in the kernel's ticks; "" where nothing says."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return fields[0], fields[19]
    except (OSError, IndexError):
        return "", ""


def _started(pid: int) -> str:
    return _process(pid)[1]


def _is_dead(process: dict[str, Any]) -> bool:
    """Return whether a process surely ended: by Slurm's turns, or as its number is free or another process' now."""
    ours, pid = _slurm(), process["pid"]
    if ours and process.get("job") == ours["job"] and process["turn"] < ours["turn"]:
        return True
    if process["where"] != _where() or not isinstance(pid, int):
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except (PermissionError, OverflowError):
        return False
    state, started = _process(pid)
    return state in ("Z", "X") or started != process["started"]  # Z: ended, and not yet waited for by its parent
