# SPDX-License-Identifier: Apache-2.0
"""How fast cells are stored and read, how much room that takes, and how peers fare with the same cells.

    python benchmarks/store.py [--scdl-python PYTHON] [--annbatch-python PYTHON] [--only PART] [--json FILE]

Parts: reading (random batches), workers (processes that read), conversion, files (conversion of several files), large
(opening a store of 100 million cells). A part's figures in FILE are replaced by the new ones, those of other parts
stay. Every task runs in a process of its own, five times where it is not itself a median of five; tasks that are
compared take turns. Files are in the page cache. Peers run by the interpreters that are named here; how to make those
is told in benchmarks/README.md.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from large_store import make_large_store
from made_cells import CELLS, draw_cells, write_cells
from measuring import REPEATS, child, medians

from megacell.core.cli import main as cli
from megacell.core.cli.parsers import table
from megacell.core.machine import where_and_when

Figures = dict[str, Any]
BLOCKS = ((1, 2048), (64, 64), (256, 32))  # of annbatch: cells a block, blocks held at a time
FILES = 4  # converted by one process and by two
BATCH_GOALS = {"of bionemo-scdl": 5.0, "of annbatch": 2.0, "of numpy slices as stored": 0.8}


class Bench:
    """The parts, each a method that returns figures and adds lines to `goals`."""

    def __init__(self, args: argparse.Namespace, folder: Path) -> None:
        self.args, self.folder = args, folder
        self.goals: list[tuple[str, str, str, str]] = []
        self._drawn: Any = None

    def _goal(self, what: str, found: float, goal: float, *, least: bool, form: str = "{:.2f}") -> None:
        met = found >= goal if least else found <= goal
        words = ("at least " if least else "at most ") + form.format(goal)
        self.goals.append((what, form.format(found), words, "met" if met else "missed"))

    # -- what the parts share

    @property
    def counts(self) -> Any:
        """The made cells."""
        if self._drawn is None:
            print(f"drawing {self.args.cells:,} cells", file=sys.stderr)
            self._drawn = draw_cells(self.args.cells, dtype=self.args.dtype)
        return self._drawn

    def _file(self, compression: str | None = None) -> Path:
        path = self.folder / f"{compression or 'plain'}.h5ad"
        if not path.exists():
            write_cells(path, self.counts, compression=compression)
        return path

    def _store(self) -> Path:
        path = self.folder / "read-store"
        if not path.exists():
            child(sys.executable, "run_megacell.py", "convert", 1, path, self._file())
        return path

    def _archive(self) -> Path:
        path = self.folder / "read-archive"
        if not path.exists():
            child(self.args.scdl_python, "run_scdl.py", "convert", self._file(), path)
        return path

    def _turns(self, tasks: dict[str, tuple[Any, ...]]) -> dict[str, Figures]:
        """Run tasks in turns, after one round that warms up; {out} names a new folder each time."""
        runs: dict[str, list[Figures]] = {name: [] for name in tasks}
        for run in range(REPEATS + 1):
            for name, (python, script, *arguments) in tasks.items():
                print(f"run {run} of {REPEATS}: {name}", file=sys.stderr)
                out = self.folder / "out.zarr"
                figures = child(python, script, *(out if each == "{out}" else each for each in arguments))
                shutil.rmtree(out, ignore_errors=True)
                if run:
                    runs[name].append(figures)
        return {name: medians(own) for name, own in runs.items()}

    # -- the parts

    def reading(self) -> Figures:
        """Random batches of 64 cells, one process, CSR out."""
        seconds, command = str(self.args.seconds), [sys.executable, "-m", cli.__name__]
        ours = subprocess.run(
            [*command, "bench", "read", str(self._store()), "--seconds", seconds, "--json"],
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        figures: Figures = json.loads(ours.stdout)
        if self.args.scdl_python:
            figures["bionemo-scdl"] = child(self.args.scdl_python, "run_scdl.py", "read", self._archive(), 0, seconds)
        if self.args.annbatch_python:
            figures |= self._annbatch(seconds)
        rate = {name: own["rows_per_cpu_second"] for name, own in figures.items() if isinstance(own, dict)}
        of = {
            "of numpy slices as stored": rate["numpy slices as stored, large counts missing"],
            "of bionemo-scdl": rate.get("bionemo-scdl"),
            "of annbatch": max((own for name, own in rate.items() if name.startswith("annbatch")), default=None),
        }
        for name, goal in BATCH_GOALS.items():
            if of[name]:
                what = f"random batches, rows a CPU-second, {name}'s"
                self._goal(what.replace("stored's", "stored"), rate["store.rows"] / of[name], goal, least=True)
        return figures

    def _annbatch(self, seconds: str) -> Figures:
        collection = self.folder / "read.zarr"
        python, script = self.args.annbatch_python, "run_annbatch.py"
        if not collection.exists():
            child(python, script, "convert", self._file(), collection)
        return {
            f"annbatch, blocks of {cells}, {blocks} held": child(
                python, script, "read", collection, cells, blocks, seconds
            )
            for cells, blocks in BLOCKS
        }

    def workers(self) -> Figures:
        """Rows a second, by the clock, of several processes."""
        seconds, store = self.args.seconds, self._store()
        figures: Figures = {}
        for n in (1, 2):
            found = child(sys.executable, "run_megacell.py", "processes", store, n, seconds)
            figures[f"{n} processes that keep their rows"] = found["rows_per_second"]
        for n in (0, 1, 2):
            found = child(sys.executable, "run_megacell.py", "read", store, n, seconds)
            figures[f"torch's DataLoader, {n} workers"] = found["rows_per_second"]
            if self.args.scdl_python:
                found = child(self.args.scdl_python, "run_scdl.py", "read", self._archive(), n, seconds)
                figures[f"bionemo-scdl in torch's DataLoader, {n} workers"] = found["rows_per_second"]
        for way in ("{} processes that keep their rows", "torch's DataLoader, {} workers"):
            ratio = figures[way.format(2)] / figures[way.format(1)]
            self._goal(f"rows a second, 2 against 1 of: {way.format('n')}", ratio, 1.0, least=True)
        return figures

    def conversion(self) -> Figures:
        """Convert one file, uncompressed and gzip; read the latter alone."""
        plain, gzip = self._file(), self._file("gzip")
        own = (sys.executable, "run_megacell.py")
        tasks: dict[str, tuple[Any, ...]] = {
            "megacell": (*own, "convert", 1, "{out}", plain),
            "megacell, gzip": (*own, "convert", 1, "{out}", gzip),
            "h5py reads the gzip one": (*own, "h5py", gzip),
        }
        if self.args.scdl_python:
            tasks["bionemo-scdl"] = (self.args.scdl_python, "run_scdl.py", "convert", plain, "{out}")
        figures = self._turns(tasks)
        seconds = {name: own["seconds"] for name, own in figures.items()}
        if self.args.scdl_python:
            ratio = seconds["bionemo-scdl"] / seconds["megacell"]
            self._goal("conversion, times as fast as bionemo-scdl", ratio, 2.0, least=True)
            ratio = figures["megacell"]["bytes"] / figures["bionemo-scdl"]["bytes"]
            self._goal("bytes on disk, of bionemo-scdl's", ratio, 0.5, least=False, form="{:.3f}")
        ratio = seconds["megacell, gzip"] / seconds["h5py reads the gzip one"]
        self._goal("conversion of gzip, times what h5py takes to read it", ratio, 1.3, least=False)
        memory = max(own["anonymous_mib"] for name, own in figures.items() if name.startswith("megacell"))
        self._goal("conversion, anonymous MiB", memory, 400, least=False, form="{:.0f}")
        return {"bytes of the files": [plain.stat().st_size, gzip.stat().st_size], **figures}

    def files(self) -> Figures:
        """Convert several files, uncompressed and gzip, by one process and by two."""
        own, tasks = (sys.executable, "run_megacell.py", "convert"), dict[str, tuple[Any, ...]]()
        for kind in ("uncompressed", "gzip"):
            paths = [self._part(number, kind) for number in range(FILES)]
            tasks |= {f"{kind}, {n} workers": (*own, n, "{out}", *paths) for n in (1, 2)}
        figures = self._turns(tasks)
        for kind in ("uncompressed", "gzip"):
            ratio = figures[f"{kind}, 1 workers"]["seconds"] / figures[f"{kind}, 2 workers"]["seconds"]
            self._goal(f"conversion of {FILES} {kind} files, times as fast by 2 workers", ratio, 1.5, least=True)
        memory = max(own["anonymous_mib"] for own in figures.values())
        self._goal(f"conversion of {FILES} files, anonymous MiB a process", memory, 400, least=False, form="{:.0f}")
        return figures

    def _part(self, number: int, kind: str) -> Path:
        """Return one of the files, of cells that no other has."""
        path = self.folder / f"part-{number}-{kind}.h5ad"
        if not path.exists():
            rolled = self.counts.copy()
            rolled.data = np.roll(rolled.data, number)
            write_cells(path, rolled, number * rolled.shape[0], compression="gzip" if kind == "gzip" else None)
        return path

    def large(self) -> Figures:
        """Open a store of 100 million cells."""
        store = self.folder / "large"
        if not store.exists():
            make_large_store(store)
        figures = self._turns({"open": (sys.executable, "run_megacell.py", "open", store)})["open"]
        self._goal("100 M cells: seconds to the first batch", figures["seconds_to_first_batch"], 1.0, least=False)
        self._goal("100 M cells: anonymous MiB of it", figures["anonymous_mib"], 200, least=False, form="{:.0f}")
        self._goal("100 M cells: descriptors", figures["descriptors"], 1000, least=False, form="{:.0f}")
        return {**figures, "bytes of the manifest": (store / "manifest.json").stat().st_size}


PARTS = ("reading", "workers", "conversion", "files", "large")


def main() -> None:
    """Measure the parts asked for, print their goals, keep their figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scdl-python", type=Path, metavar="PYTHON", help="an interpreter that has bionemo-scdl 0.1.3")
    parser.add_argument("--annbatch-python", type=Path, metavar="PYTHON", help="an interpreter that has annbatch")
    parser.add_argument("--only", choices=PARTS, action="append", help="this part; may be given again (default: all)")
    parser.add_argument("--cells", type=int, default=CELLS, help="to make (default: %(default)s)")
    parser.add_argument("--dtype", choices=("float32", "int32"), default="float32", help="of their counts")
    parser.add_argument("--seconds", type=float, default=10.0, help="of a rate's five runs (default: %(default)s)")
    parser.add_argument("--folder", type=Path, help="keep files here, and take those that are here already")
    parser.add_argument("--json", type=Path, help="keep the figures in this file")
    args = parser.parse_args()
    kept = json.loads(args.json.read_text()) if args.json and args.json.exists() else {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        bench = Bench(args, folder)
        for part in args.only or PARTS:
            bench.goals = []
            when = where_and_when()
            figures = getattr(bench, part)()
            made = {"cells": args.cells, "dtype": args.dtype}
            goals = [dict(zip(("figure", "found", "goal", "result"), goal, strict=True)) for goal in bench.goals]
            absent = {"bionemo-scdl": args.scdl_python, "annbatch": args.annbatch_python}
            missing = [name for name, python in absent.items() if not python]
            after = {"load_average_after": os.getloadavg()[0]}
            kept[part] = {**when, **after, "made": made, "goals": goals, "not_measured": missing, "figures": figures}
            print(f"{part}, {when['date']}, {when['hardware']['processor']}, load {when['load_average_before']:.1f}")
            print(table(("figure", "found", "goal", ""), bench.goals))
            if args.json:
                args.json.write_text(json.dumps(kept, indent=1) + "\n")


if __name__ == "__main__":
    main()
