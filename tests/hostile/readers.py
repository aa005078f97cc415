# SPDX-License-Identifier: Apache-2.0
"""Readers of a store while it is appended to, compacted and pruned: each read gives the cells that were there."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import ground
import states
from bench import Tally
from scenarios import APPEND_B, APPEND_C, COMPACT, CONVERT_A, PRUNE
from shim import Order
from tries import Tries, end_with

READERS = 4
LIMIT = 300.0  # seconds for a command that has to share the machine with readers
WRITERS = (APPEND_B, APPEND_C, COMPACT, PRUNE)


def read(tries: Tries, folder: Path, names: dict[str, Path], rounds: int) -> Tally:
    """Let readers read in a loop while a store grows, is compacted and pruned, so many times."""
    from megacell.core.cli.main import main

    tally = Tally("readers", "append, compact, prune")
    for number in range(rounds):
        place = folder / f"read-{number}"
        place.mkdir()
        _run(tries, place, lambda: main(ground.fill(CONVERT_A, names)))
        anew, held = (str(tries.ask(lambda: _digest(_open(place), metadata))) for metadata in (True, False))  # noqa: B023
        readers = [_start(place, which, held if which % 2 else anew) for which in range(READERS)]
        for words in WRITERS:
            _run(tries, place, lambda: main(ground.fill(words, names)))  # noqa: B023
        (place / "stop").touch()
        for which, reader in enumerate(readers):
            os.waitpid(reader, 0)
            count, wrong = json.loads((place / f"reader-{which}").read_text())
            tally.tried += count
            tally.hit += count
            tally.lost += wrong
    return tally


def _run(tries: Tries, place: Path, work: Callable[[], int]) -> None:
    ended = tries.command(work, place, Order(), limit=LIMIT)
    if ended.code != 0:
        raise AssertionError(f"exit code {ended.code}: {ended.err}")


def _start(place: Path, which: int, expected: str) -> int:
    """Fork a reader; every other one holds the store open, the others open it anew for each read."""
    reader = os.fork()
    if reader == 0:
        end_with(lambda: _loop(place, which, expected))
    return reader


def _loop(place: Path, which: int, expected: str) -> int:
    """Read until told to stop; write down how often, and what was wrong."""
    held = _open(place) if which % 2 else None
    count, wrong = 0, []
    while not (place / "stop").exists():
        count += 1
        try:
            found = _digest(held or _open(place), metadata=held is None)
        except Exception as error:
            found = f"{type(error).__name__}: {error}"
        if found != expected:
            wrong.append(f"a reader that {'holds the store open' if held else 'opens it anew'} got {found}")
    (place / f"reader-{which}").write_text(json.dumps([count, wrong[:3]]))
    return 0


def _open(place: Path):
    from megacell.store import CellStore

    return CellStore.open(place / "s")


def _digest(store, metadata: bool = True) -> str:
    """Return the hash of the first cells; prune takes the metadata of an old generation away, as it says."""
    rows = store.rows(slice(0, ground.CELLS))
    types = store.obs_slice(["cell_type"], 0, ground.CELLS)["cell_type"].astype(str).tolist() if metadata else []
    return states.digest(rows.indices.tobytes(), rows.data.tobytes(), json.dumps(types).encode())
