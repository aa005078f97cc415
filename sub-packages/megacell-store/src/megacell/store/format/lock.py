# SPDX-License-Identifier: Apache-2.0
"""One writer a store: a lock by exclusive creation, which network file systems honour where flock fails."""

import errno
import json
import os
import secrets
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megacell.core.errors import DataError

NAME = ".lock"


@contextmanager
def writing(store: Path, name: str = NAME) -> Iterator[None]:
    """Hold the store's lock, or another of that name; one whose process died on this machine is taken over.

    Raises
    ------
    DataError
        Another process, or one of another machine that cannot be asked, is writing.
    """
    lock = store / name
    mine = json.dumps({**_self(), "token": secrets.token_hex(8)}).encode()
    try:
        _create(lock, mine)
    except FileExistsError:
        _take_over(lock, mine)
    try:
        yield
    finally:
        if lock.exists() and lock.read_bytes() == mine:
            lock.unlink()


def _create(path: Path, content: bytes) -> None:
    """Create a file with its content in one step, written beside and then linked; FileExistsError if it is there.

    On a file system without links it is created exclusively and then filled; who meets it empty respects it.
    """
    temporary = path.with_name(f"{NAME}-{secrets.token_hex(8)}")
    try:
        temporary.write_bytes(content)
        os.link(temporary, path)
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.ENOSYS):
            raise
        with open(path, "xb") as file:
            file.write(content)
    finally:
        temporary.unlink(missing_ok=True)


def _take_over(lock: Path, mine: bytes) -> None:
    """Replace the lock of a dead process.

    Only who holds the claim, a file named after the dead lock's token, may replace it, so of several that find
    the same dead lock one wins. A claim is itself a lock, and that of a dead process is taken over likewise.
    """
    held = f"{lock.parent}: another conversion is writing here ({lock}); wait for it, or delete the lock if none runs"
    token = _dead_token(lock)
    if token is None:
        raise DataError(held)
    claim = lock.with_name(f"{NAME}-{token}.claim")
    try:
        _create(claim, mine)
    except FileExistsError:
        _take_over(claim, mine)
    try:
        if _dead_token(lock) != token:  # another one took it over, and let its claim go, since we looked
            raise DataError(held)
        temporary = lock.with_name(f"{NAME}-{secrets.token_hex(8)}")
        temporary.write_bytes(mine)
        os.replace(temporary, lock)
    finally:
        claim.unlink()


def is_held(lock: Path) -> bool:
    """True if a lock is there and its process may live."""
    return lock.exists() and _dead_token(lock) is None and lock.exists()


def _dead_token(lock: Path) -> str | None:
    """Return the token of a lock whose process surely ended; None if it may live, or let go meanwhile."""
    try:
        theirs = json.loads(lock.read_bytes())
        return str(theirs["token"]) if _is_dead(theirs) else None
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError):
        raise DataError(f"{lock}: not a lock of ours; delete it if no conversion is running") from None


def _self() -> dict[str, object]:
    """Say which process this is: a process number means nothing on another machine or in another container."""
    return {"where": _where(), "pid": os.getpid(), "started": _started(os.getpid())}


def _where() -> str:
    try:
        namespace = os.readlink("/proc/self/ns/pid")
    except OSError:
        namespace = ""
    return f"{socket.gethostname()} {namespace}".strip()


def _started(pid: int) -> str:
    """Return the time at which a process started, in the kernel's ticks, "" where the system does not say."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except OSError:
        return ""


def _is_dead(process: dict[str, object]) -> bool:
    """True if the process surely ended: same machine, and its number is free or was given to a later process."""
    pid = process["pid"]
    if process["where"] != _where() or not isinstance(pid, int):
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    return _started(pid) != process["started"]
