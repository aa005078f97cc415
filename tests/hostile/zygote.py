# SPDX-License-Identifier: Apache-2.0
"""Run by watch.py: imports everything once, then tries commands in forks of itself, as lines of its input ask for.

Usage: zygote.py FOLDER OWN DATA, started with the shim preloaded; OWN is below FOLDER. A line is a JSON list: kind,
command, tries, seed. For each it prints a line, a JSON object: what was tried, what hit, what was lost.
"""

import contextlib
import dataclasses
import importlib
import json
import os
import pkgutil
import sys
import time
from pathlib import Path

import faults
import ground
import kills
import readers
from bench import Bench, Tally
from scenarios import BY_NAME
from shim import NAME, Order, Page
from tries import Tries

CAMPAIGNS = {"kills": kills.kill, "faults": faults.fail}
WAIT = 600.0  # seconds for a command that makes a part of the ground
CELLS = ("megacell.core.", "megacell.store.", "megacell.geneformer.tokens.", "megacell.geneformer.vocabulary.")
TRAINING = ("megacell.",)
SPARED = ("megacell.__main__", "megacell.geneformer.bench", "megacell.geneformer.demo")
LATE = (  # what commands import when they run
    "anndata", "nemo.utils.exp_manager", "torch.distributed.launcher.api",
    "torch.distributed.elastic.multiprocessing.subprocess_handler.subprocess_handler",
)  # fmt: skip


def import_all(*, training: bool) -> None:
    """Import and compile what commands need, and start no thread."""
    import megacell

    for module in pkgutil.walk_packages(megacell.__path__, "megacell."):
        if module.name.startswith(TRAINING if training else CELLS) and not module.name.startswith(SPARED):
            with contextlib.suppress(ImportError):  # of what need not be installed
                importlib.import_module(module.name)
    for name in LATE if training else ():
        importlib.import_module(name)
    from megacell.store.conversion.warm_up import prepare

    prepare()


def make_ground(folder: Path, data: Path, page: Page, *, training: bool) -> Tally:
    """Make what the tried commands read, each in a fork."""
    from megacell.core.cli.main import main

    tries, names = Tries(folder, page), ground.places(folder / "ground", data)
    tries.ask(lambda: ground.take_cells(data, names["cells"]))
    for words in ground.lines(training=training):
        line = ground.fill(words, names)
        ended = tries.command(lambda: main(line), folder, Order(), limit=WAIT)  # noqa: B023
        if ended.code != 0:
            return Tally("ground", words[0], lost=[f"{line}: exit code {ended.code}: {ended.err}"])
    return Tally("ground", "")


class Zygote:
    """Does jobs; keeps the bench of the last command.

    Parameters
    ----------
    folder : Path
        Of the watch: the ground lies in it, and a folder for this process.
    own : Path
        The latter.
    data : Path
        Real cells and dictionaries.
    """

    def __init__(self, folder: Path, own: Path, data: Path):
        self._folder, self._own, self._data, self._page = folder, own, data, Page(Path(os.environ[NAME]))
        self._names = ground.places(folder / "ground", data)
        self._imported, self._bench = "", None

    def do(self, kind: str, command: str, tries: int, seed: int) -> dict:
        """Do one job; returns its tally."""
        begun = time.monotonic()
        if kind == "ground":
            self._import(training=command == "models")
            tally = make_ground(self._folder, self._data, self._page, training=command == "models")
        elif kind == "readers":
            self._import(training=False)
            tally = readers.read(Tries(self._own, self._page), self._own, self._names, tries)
        else:
            try:
                tally = CAMPAIGNS[kind](self._of(command), tries, seed)
            except AssertionError as error:  # it fails undisturbed: the other commands are tried nevertheless
                tally = Tally(kind, command, lost=[str(error)])
        tally.seconds = time.monotonic() - begun
        return dataclasses.asdict(tally)

    def _of(self, command: str) -> Bench:
        if self._bench is None or self._bench.scenario.name != command:
            scenario = BY_NAME[command]
            self._import(training=scenario.training)
            self._bench = Bench(scenario, self._own, self._names, self._page)
        return self._bench

    def _import(self, *, training: bool) -> None:
        wanted = "all" if training else "cells"
        if self._imported not in ("all", wanted):
            import_all(training=training)
            self._imported = wanted


def main() -> None:
    """Do a job a line until there is none left."""
    folder, own, data = map(Path, sys.argv[1:])
    zygote = Zygote(folder, own, data)
    for line in sys.stdin:
        print(json.dumps(zygote.do(*json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
