# SPDX-License-Identifier: Apache-2.0
"""What this process holds in memory, as the system tells."""

import sys
from pathlib import Path


def own_memory() -> int:
    """Return the bytes of this process that are no file's pages, 0 where the system does not say."""
    return _told("RssAnon") or 0


def peak_memory() -> int:
    """Return the most bytes that this process has held, files' mapped pages included; 0 where the system does not say.

    Linux counts into ``ru_maxrss`` what the process that started this one has held, but not into ``VmHWM``.
    """
    if (told := _told("VmHWM")) is not None:
        return told
    try:
        import resource
    except ImportError:
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _told(name: str) -> int | None:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:")), None)
