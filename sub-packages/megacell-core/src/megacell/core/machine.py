# SPDX-License-Identifier: Apache-2.0
"""What a machine has, and what this process holds of it: cores, memory, limits, disks.

Functions that return a `Finding` are checks of `megacell doctor`; their `root` stands before /proc and /sys, so that
tests can show other machines. `where_and_when` heads the figures of a measurement.
"""

import datetime
import os
import platform
import re
import resource
import secrets
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megacell.core.errors import UsageError
from megacell.core.files import TEMPORARY
from megacell.core.findings import OK, WARNING, WRONG, Finding
from megacell.core.versions import installed_version, version_of

GIB = 2**30
PROBE = 128 * 2**20  # bytes written and read back to measure a disk
_BLOCK = 4 * 2**20  # bytes of one write or read of it
_LEAST_MEMORY = 4 * GIB  # free: NeMo and Megatron take 1.5 of it
_LEAST_SHARED = GIB
_LEAST_DISK = 10 * GIB
_LEAST_FILES = 1024
_LEAST_SPEED = 100e6  # bytes a second, under which training waits for data
_NETWORK = re.compile(r"nfs|lustre|gpfs|beegfs|ceph|cifs|smb|9p|fuse|afs|wekafs|virtiofs")
_LIBRARIES = ("numpy", "numba", "pyarrow")  # that a measurement depends on


def cores(root: Path = Path("/")) -> Finding:
    """Return how many cores this process may use: those it is bound to, and its container's share."""
    usable, total = len(os.sched_getaffinity(0)), os.cpu_count() or 1
    share = _cpu_share(root)
    value = f"{usable} of {total}" if usable < total else f"{total}"
    if share is not None and share < usable:
        return Finding("machine", "cores", f"{value}, limited to {share:.1f} by the container")
    return Finding("machine", "cores", value)


def _cpu_share(root: Path) -> float | None:
    try:
        quota, period = (root / "sys/fs/cgroup/cpu.max").read_text().split()
        return None if quota == "max" else int(quota) / int(period)
    except (OSError, ValueError):
        return None


def memory(root: Path = Path("/")) -> Finding:
    """Return the memory that is there and free, within the container's limit."""
    facts = dict(re.findall(r"^(\w+):\s+(\d+) kB", (root / "proc/meminfo").read_text(), re.MULTILINE))
    total, free = int(facts["MemTotal"]) * 1024, int(facts["MemAvailable"]) * 1024
    limit, used = (_cgroup_bytes(root, name) for name in ("memory.max", "memory.current"))
    text = ""
    if limit is not None and limit < total:
        total, free, text = limit, min(free, limit - (used or 0)), " (the container's limit)"
    value = f"{total / GIB:,.1f} GiB{text}, {free / GIB:,.1f} free"
    if free < _LEAST_MEMORY:
        fix = f"training wants {_LEAST_MEMORY / GIB:.0f} GiB and more: end other programs, or take a larger machine"
        return Finding("machine", "memory", value, WARNING, fix)
    return Finding("machine", "memory", value)


def _cgroup_bytes(root: Path, name: str) -> int | None:
    try:
        return int((root / "sys/fs/cgroup" / name).read_text())
    except (OSError, ValueError):  # no such file, or "max"
        return None


def shared_memory(path: Path = Path("/dev/shm")) -> Finding:
    """Return the size of /dev/shm, through which NCCL's ranks on one machine talk."""
    try:
        size = shutil.disk_usage(path)
    except OSError:
        return Finding("machine", str(path), "not there", WARNING, "several GPUs need it: mount a tmpfs there")
    value = f"{size.total / GIB:,.1f} GiB, {size.free / GIB:,.1f} free"
    if size.free < _LEAST_SHARED:
        fix = "several GPUs need more: docker run --ipc host (or --shm-size 8g); Kubernetes: an emptyDir in memory"
        return Finding("machine", str(path), value, WARNING, fix)
    return Finding("machine", str(path), value)


def open_files() -> Finding:
    """Return how many files a process may hold open; a store maps five for each shard."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    value = f"{soft:,}" if soft != resource.RLIM_INFINITY else "unlimited"
    if soft != resource.RLIM_INFINITY and soft < _LEAST_FILES:
        fix = f"large stores need more: ulimit -n {hard if hard != resource.RLIM_INFINITY else 65536}"
        return Finding("machine", "open files", value, WARNING, fix)
    return Finding("machine", "open files", value)


def file_system(path: Path, root: Path = Path("/")) -> str:
    """Return the type of the file system that a path lies on, or "unknown"."""
    kind, length = "unknown", -1
    real = os.path.realpath(path)
    for line in (root / "proc/self/mountinfo").read_text().splitlines():
        before, _, after = line.partition(" - ")
        mounted = re.sub(r"\\(\d{3})", lambda code: chr(int(code[1], 8)), before.split()[4])
        if (real == mounted or real.startswith(mounted.rstrip("/") + "/")) and len(mounted) >= length:
            kind, length = after.split()[0], len(mounted)
    return kind


def disk(path: Path, *, measure: bool, root: Path = Path("/")) -> list[Finding]:
    """Return file system, free space and speed of the disk under a folder.

    Raises
    ------
    UsageError
        If there is no such folder.
    """
    if not path.is_dir():
        raise UsageError(f"--path {path}: no such folder; name the one that is to hold stores and runs")
    topic, space = f"disk under {path}", shutil.disk_usage(path)
    findings = [_kind_of_disk(topic, file_system(path, root)), _free_space(topic, space.free, space.total)]
    if not os.access(path, os.W_OK):
        fix = "a store may be read from there; choose another folder for stores and runs to be made in"
        return [*findings, Finding(topic, "writable", "no", WARNING, fix)]
    return findings + (_speed(topic, path, space.free) if measure else [])


def _kind_of_disk(topic: str, kind: str) -> Finding:
    fix = ""
    if kind == "tmpfs":
        fix = "it is memory: what lies there is lost with the machine"
    elif _NETWORK.search(kind):
        fix = "a network or user-space file system: where reading is slow, copy the store to a local disk"
    return Finding(topic, "file system", kind, WARNING if fix else OK, fix)


def _free_space(topic: str, free: int, total: int) -> Finding:
    fix = "stores and checkpoints may not fit: free some, or take another --path" if free < _LEAST_DISK else ""
    return Finding(topic, "free", f"{free / GIB:,.1f} of {total / GIB:,.1f} GiB", WARNING if fix else OK, fix)


def _speed(topic: str, path: Path, free: int) -> list[Finding]:
    if free < 2 * PROBE:
        return [Finding(topic, "speed", "not measured", WRONG, "the disk is full: free some space")]
    try:
        speed = measure_disk(path)
    except OSError as error:
        return [Finding(topic, "speed", f"not measured: {error}", WRONG, "repair the disk, or take another --path")]
    reading = f"{speed.read / 1e6:,.0f} MB/s" + ("" if speed.cold else ", out of the page cache")
    fix = "training may wait for data: copy stores to a local disk" if speed.read < _LEAST_SPEED else ""
    return [
        Finding(topic, "writing", f"{speed.write / 1e6:,.0f} MB/s"),
        Finding(topic, "reading", reading, WARNING if fix else OK, fix),
    ]


@dataclass(frozen=True)
class Speed:
    """Bytes a second; `cold`: what was read did not come from the page cache."""

    write: float
    read: float
    cold: bool


def measure_disk(folder: Path, size: int = PROBE) -> Speed:
    """Write a file, flushed, then read it with the page cache emptied of it; the file is removed."""
    path = folder / f"megacell-doctor-{secrets.token_hex(4)}{TEMPORARY}"
    block = secrets.token_bytes(_BLOCK)
    cold = hasattr(os, "posix_fadvise")
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL)
    try:
        begun = time.perf_counter()
        for _ in range(size // len(block)):
            os.write(descriptor, block)
        os.fsync(descriptor)
        written = time.perf_counter()
        if cold:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.lseek(descriptor, 0, os.SEEK_SET)
        started = time.perf_counter()
        while os.read(descriptor, len(block)):
            pass
        return Speed(size / (written - begun), size / (time.perf_counter() - started), cold)
    finally:
        os.close(descriptor)
        path.unlink()


def where_and_when() -> dict[str, Any]:
    """Return date, hardware, load and versions, in JSON's types."""
    libraries = {name: version_of(name) or "not installed" for name in _LIBRARIES}
    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "hardware": {"processor": _processor(), "cores": os.cpu_count()},
        "load_average_before": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "versions": {"python": platform.python_version(), **libraries, "megacell": installed_version()},
    }


def _processor() -> str:
    names = [line.partition(":")[2].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def own_memory() -> int:
    """Return the bytes of this process that are no file's pages, 0 where the system does not say."""
    return _process_bytes("RssAnon") or 0


def peak_memory() -> int:
    """Return the most bytes that this process has held, files' mapped pages included.

    Linux counts into ``ru_maxrss`` what the process that started this one has held, but not into ``VmHWM``.
    """
    peak = _process_bytes("VmHWM")
    if peak is None:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return peak


def _process_bytes(name: str) -> int | None:
    """Return an entry of /proc/self/status, None where the system has none."""
    lines = (line.split() for line in _lines("/proc/self/status") if line.startswith(f"{name}:"))
    return next((int(kib) * 1024 for _, kib, *_ in lines), None)


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []
