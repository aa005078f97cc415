# SPDX-License-Identifier: Apache-2.0
"""Starts a run's processes on this machine through torchrun's agent, and passes on the signals that end it."""

import contextlib
import ctypes
import ipaddress
import logging
import os
import signal
import socket
import sys
import uuid
from collections.abc import Mapping
from typing import Any

from megacell.core.errors import UsageError

INTERRUPTED = 75  # exit code after a signal: a checkpoint was saved, resume=true goes on (sysexits' EX_TEMPFAIL)
_PARENT = "MEGACELL_LAUNCHER"  # in the environment of the ranks: the id of the process that started them
_FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


def started_by_launcher() -> bool:
    """Return whether torchrun, srun or this module started this process as one rank of several."""
    return "TORCHELASTIC_RUN_ID" in os.environ or int(os.environ.get("SLURM_NTASKS", "1")) > 1


def world_size(devices: int) -> int:
    """Return the number of ranks: the launcher's, or ``devices``."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return int(os.environ["WORLD_SIZE"])
    return max(devices, int(os.environ.get("SLURM_NTASKS", "1")))


def local_size(devices: int) -> int:
    """Return the number of ranks on this machine."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return int(os.environ["LOCAL_WORLD_SIZE"])
    if not started_by_launcher():
        return devices
    return int(os.environ["SLURM_NTASKS"]) // int(os.environ.get("SLURM_NNODES", "1"))


def rank() -> int:
    """Return the number of this process among those that its launcher started, 0 for the launcher itself."""
    return int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")))


def is_first() -> bool:
    """Return whether this process is the run's rank 0 (or its launcher)."""
    return rank() == 0


def end_with_parent() -> None:
    """Have the kernel end this process when its parent dies, so that a killed run leaves none behind (Linux)."""
    if sys.platform == "linux":
        parent = int(os.environ.get(_PARENT, os.getppid()))
        ctypes.CDLL(None, use_errno=True).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
        if os.getppid() != parent:  # it died before
            os.kill(os.getpid(), signal.SIGKILL)


def _children() -> list[int]:
    with open(f"/proc/self/task/{os.getpid()}/children") as file:
        return [int(pid) for pid in file.read().split()]


def _forward(number: int, frame: object) -> None:
    for pid in _children():
        os.kill(pid, number)


def _is_here(endpoint: str) -> bool:
    """Return whether an endpoint is an address of this machine, beside its loopback, at which nobody listens yet.

    torch asks only what the machine's own name resolves to, which may be its loopback address and no other.
    """
    host, _, port = endpoint.rpartition(":")
    with contextlib.suppress(OSError, ValueError):
        family, *_, address = socket.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_STREAM)[0]
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # of a run that has just ended there
            probe.bind(address)
        return not ipaddress.ip_address(address[0]).is_loopback
    return False


def launch(devices: int, overrides: list[str], meeting: Mapping[str, Any] | None = None) -> int:
    """Run ``megacell pretrain`` in ``devices`` processes here and return their exit code.

    For several machines the same is called on each, and ``meeting`` is ``launcher`` of the settings: nodes, endpoint,
    address, id.

    The agent's own answer to a signal (wait 30 s, then kill) would cut a save short: it leaves them to us, and
    the ranks end themselves once their checkpoint stands. A rank that dies ends the others.

    Raises
    ------
    UsageError
        The machines did not meet.
    """
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous import RendezvousError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # its tables; a rank says why it ended
    config = LaunchConfig(
        min_nodes=meeting["nodes"] if meeting else 1,
        max_nodes=meeting["nodes"] if meeting else 1,
        nproc_per_node=devices,
        run_id=meeting["id"] if meeting else uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint=meeting["endpoint"] if meeting else "localhost:0",
        rdzv_configs={"is_host": True} if meeting and _is_here(meeting["endpoint"]) else {},
        local_addr=meeting["address"] if meeting else None,
        max_restarts=0,
        monitor_interval=0.5,
        signals_to_handle="SIGQUIT",
    )
    os.environ[_PARENT] = str(os.getpid())
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // devices)))
    previous = {number: signal.signal(number, _forward) for number in _FORWARDED}
    try:
        command = ("-m", "megacell", "pretrain", *overrides)
        elastic_launch(config, sys.executable)(*command)
    except ChildFailedError as error:
        code = error.get_first_failure()[1].exitcode
        if code < 0:
            print(f"megacell pretrain: a rank was ended by {signal.Signals(-code).name}", file=sys.stderr)
        return code if code > 0 else 1
    except RendezvousError as error:
        raise UsageError(
            f"launcher.endpoint={config.rdzv_endpoint}: {config.min_nodes} machine(s) did not meet there ({error}): "
            "start the same command on each, with a free port of the first"
        ) from error
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    return 0
