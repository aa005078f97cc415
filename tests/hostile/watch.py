# SPDX-License-Identifier: Apache-2.0
"""`make test-hostile`: kills, failing disks, readers beside writers and hostile inputs, as one table.

Usage: watch.py [--quick] [--seed N] [--kills N] [--faults N] [--only TEXT] …; it ends with 1 if anything was lost or
let through, or, in full, if less was tried than is promised. Each command that writes is killed at its calls and
between them, and its calls are let fail: kills.py, faults.py. Inputs are the parametrised cases of the tests beside.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import inputs
import shim
from bench import Tally
from scenarios import CARELESS, SCENARIOS

ROOT = Path(__file__).resolve().parents[2]
PROMISED = {"kills": 200, "faults": 100, "inputs": 200}  # that hit
QUICK = ("convert append", "compact", "vocabulary build", "tokenize")
INPUTS = "inputs"
EVERY = 5  # of the damaged files
SHOWN = 6  # lines of what was lost by a command
OF_HARNESS = "test_harness.py"
Job = tuple[str, str, int, int]


class Worker:
    """A zygote, with a folder of its own; started when there is something to do, and again if it ends."""

    def __init__(self, number: int, folder: Path, library: Path, data: Path):
        own = folder / f"worker-{number}"
        own.mkdir()
        shim.Page(own / "page")
        self._environment = shim.environment(library, own / "page")
        self._environment |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        self._command = [sys.executable, Path(__file__).with_name("zygote.py"), folder, own, data]
        self._log, self._process = own / "log", None

    def do(self, job: Job) -> Tally:
        """Do a job; returns its tally."""
        if self._process is None:
            with open(self._log, "w") as log:
                self._process = subprocess.Popen(
                    self._command, env=self._environment, text=True,
                    stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log,
                )  # fmt: skip
        self._process.stdin.write(json.dumps(job) + "\n")
        self._process.stdin.flush()
        if line := self._process.stdout.readline():
            return Tally(**json.loads(line))
        self.end()
        return Tally(*job[:2], lost=[f"the harness ended: {self._log.read_text()[-2000:]}"])

    def end(self) -> None:
        """Let it end."""
        if self._process is not None:
            self._process.stdin.close()
            self._process.wait()
            self._process = None


def jobs_of(args: argparse.Namespace) -> list[Job]:
    """Return what is to be done, commands that need no training first."""
    known = [*SCENARIOS, CARELESS] if args.only else SCENARIOS
    chosen = [s for s in known if (s.name in QUICK if args.quick else args.only in s.name)]
    chosen.sort(key=lambda scenario: scenario.training)
    kinds = [("kills", args.kills), ("faults", args.faults)]
    jobs = [(kind, s.name, tries, args.seed + n) for n, s in enumerate(chosen) for kind, tries in kinds if tries]
    return jobs if args.quick or args.only else [("readers", "", 1, args.seed), *jobs]


def do_all(workers: list[Worker], jobs: list[Job]) -> list[Tally]:
    """Do jobs, each worker one at a time; those of a command by the same worker, which knows it by then."""
    groups: dict[str, list[Job]] = {}
    for job in jobs:
        groups.setdefault(job[1], []).append(job)
    todo = iter(groups.values())  # of several threads: taking one is atomic
    tallies: list[Tally] = []

    def work(worker: Worker) -> None:
        for group in todo:
            for job in group:
                tallies.append(worker.do(job))
                print("\n".join([row(tallies[-1]), *complaints(tallies[-1])]), flush=True)

    threads = [threading.Thread(target=work, args=(worker,)) for worker in workers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return tallies


def try_commands(args: argparse.Namespace, folder: Path) -> list[Tally]:
    """Kill commands, and let their calls fail."""
    library, jobs = shim.build(folder), jobs_of(args)
    training = any(s.training for s in SCENARIOS if s.name in {job[1] for job in jobs})
    workers = [Worker(number, folder, library, args.data) for number in range(args.at_once)]
    try:
        made = workers[0].do(("ground", "models" if training else "cells", 0, 0))
        return [made] if made.lost else do_all(workers, jobs)
    finally:
        for worker in workers:
            worker.end()


def try_inputs(args: argparse.Namespace, folder: Path) -> list[Tally]:
    """Run the test files beside, and damage files of all formats."""
    files = [path for path in sorted(Path(__file__).parent.glob("test_*.py")) if path.name != OF_HARNESS]
    os.environ["MEGACELL_TEST_DATA"] = str(args.data)
    tallies = inputs.count(files, folder, args.at_once) if files else []
    (folder / "damaged").mkdir()
    return [*tallies, inputs.fuzz(ROOT, folder / "damaged", EVERY)]


HEAD = f"{'':8}{'':32}{'tried':>7}{'hit':>7}{'lost / let through':>20}{'left behind':>13}{'seconds':>9}"


def row(tally: Tally) -> str:
    """Return a line of the table."""
    return (
        f"{tally.kind:8}{tally.command:32}{tally.tried:7,}{tally.hit:7,}{len(tally.lost):20,}{tally.left:13,}"
        f"{tally.seconds:9,.0f}"
    )


def table(tallies: list[Tally]) -> str:
    """Return all rows, by kind, each kind with its sum."""
    lines = [HEAD]
    for kind in dict.fromkeys(tally.kind for tally in tallies):
        own = sorted((tally for tally in tallies if tally.kind == kind), key=lambda tally: tally.command)
        whole = Tally(kind, "all")
        for tally in own:
            for name in ("tried", "hit", "left", "lost", "seconds"):
                setattr(whole, name, getattr(whole, name) + getattr(tally, name))
        lines += [row(tally) for tally in own] + [row(whole), ""]
    return "\n".join(lines)


def complaints(tally: Tally) -> list[str]:
    """Return what was lost, a line each, the first of many."""
    lines = [f"  {tally.kind}: {' '.join(line.split())}" for line in tally.lost[:SHOWN]]
    more = len(tally.lost) - SHOWN
    return [*lines, f"  {tally.kind}: {tally.command}: and {more} more"] if more > 0 else lines


def verdict(tallies: list[Tally], *, full: bool) -> list[str]:
    """Return a line for what must not be: lost, let through, or, in full, tried too seldom."""
    wrong = [line for tally in tallies for line in complaints(tally)]
    for kind, least in PROMISED.items() if full else ():
        hit = sum(tally.hit for tally in tallies if tally.kind == kind)
        if hit < least:
            wrong.append(f"  {kind}: {hit} hit, at least {least} are promised")
    return wrong


def arguments() -> argparse.Namespace:
    """Return what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a few commands, a few tries of each")
    parser.add_argument("--only", default="", metavar="TEXT", help="commands whose name holds this; or: inputs")
    parser.add_argument("--without-inputs", action="store_true", help="commands alone, where time is short")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kills", type=int, metavar="N", help="tries a command, each of up to two kills (8; quick: 2)")
    parser.add_argument("--faults", type=int, metavar="N", help="a command (15; quick: 4)")
    parser.add_argument("--at-once", type=int, default=2, metavar="N", help="processes that try (2)")
    default = os.environ.get("MEGACELL_TEST_DATA") or ROOT.parent / "shared" / "data"
    parser.add_argument("--data", type=Path, default=default, help="the folder of real cells ($MEGACELL_TEST_DATA)")
    args = parser.parse_args()
    args.kills = args.kills if args.kills is not None else 2 if args.quick else 8
    args.faults = args.faults if args.faults is not None else 4 if args.quick else 15
    args.data = args.data.resolve()
    return args


def main() -> int:
    """Try all, print the table, and return 1 if anything was lost."""
    args, begun = arguments(), time.monotonic()
    folder = Path(tempfile.mkdtemp(prefix="hostile-"))
    try:
        print(HEAD, flush=True)
        tallies = try_commands(args, folder) if args.only != INPUTS else []
        if args.only == INPUTS or not (args.only or args.quick or args.without_inputs):
            tallies += try_inputs(args, folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    wrong = verdict(tallies, full=not (args.quick or args.only or args.without_inputs))
    print("\n".join(["", table(tallies), *wrong]))
    lost = sum(len(tally.lost) for tally in tallies)
    print(f"{lost} lost or let through; {time.monotonic() - begun:,.0f} s")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
