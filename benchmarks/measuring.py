# SPDX-License-Identifier: Apache-2.0
"""How the benchmarks measure: rates of batches as medians, and tasks in processes of their own, their memory watched.

Needs nothing but Python: the scripts that run in a peer's environment import it too.
"""

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

BATCH, REPEATS = 64, 5
_LOOK = 0.005  # seconds between looks at a process's memory


def rates(rows: Iterator[int], seconds: float) -> dict[str, float]:
    """Return rows a second and a CPU-second of this process: medians of five runs, after one to warm up.

    Parameters
    ----------
    rows : iterator of int
        Endless; makes a batch at each step and gives its rows.
    seconds : float
        Of all runs together.
    """
    walls, cpus = [], []
    for run in range(REPEATS + 1):
        n, wall, cpu = 0, time.perf_counter(), time.process_time()
        while not n or time.perf_counter() - wall < seconds / REPEATS:
            n += next(rows)
        if run:
            walls.append(n / (time.perf_counter() - wall))
            cpus.append(n / (time.process_time() - cpu))
    return {"rows_per_second": statistics.median(walls), "rows_per_cpu_second": statistics.median(cpus)}


def timed(work: Any) -> dict[str, float]:
    """Run a function; return seconds, and CPU seconds of this process and of children that it waited for."""
    import resource

    def cpu() -> float:
        return time.process_time() + sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2])

    start, before = time.perf_counter(), cpu()
    work()
    return {"seconds": time.perf_counter() - start, "cpu_seconds": cpu() - before}


def size_of(folder: Path) -> int:
    """Return the bytes of all files below a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def child(python: str | Path, script: str, *arguments: Any) -> dict[str, Any]:
    """Run a script of this folder in a process of its own; return the JSON that it prints last.

    Added are ``process_seconds``, from start to end, and ``anonymous_mib``: the most that one of its processes held
    beside files' pages.
    """
    command = [str(python), "-W", "ignore", str(Path(__file__).with_name(script)), *map(str, arguments)]
    start, peak = time.perf_counter(), 0
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        while process.poll() is None:
            peak = max(peak, *map(_anonymous, _family(process.pid)))
            time.sleep(_LOOK)
        assert process.stdout is not None
        said = process.stdout.read()
    if process.returncode:
        sys.exit(f"{' '.join(command)}: ended with {process.returncode}")
    seconds = time.perf_counter() - start
    return {**json.loads(said.splitlines()[-1]), "process_seconds": seconds, "anonymous_mib": peak / 1024}


def _family(process: int) -> list[int]:
    family = [process]
    for own in family:
        try:
            text = Path(f"/proc/{own}/task/{own}/children").read_text()
        except OSError:
            continue
        family += map(int, text.split())
    return family


def _anonymous(process: int) -> int:
    """Return the KiB of a process that are no file's pages, 0 once it is gone."""
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith("RssAnon")), 0)


def medians(runs: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Return the medians of several runs' figures, of memory the largest."""
    return {
        name: (max if name == "anonymous_mib" else statistics.median)(run[name] for run in runs) for name in runs[0]
    }
