# SPDX-License-Identifier: Apache-2.0
"""Run by test_tokenize.py: kills `tokenize` at each of its steps, twice in a row, and compares what the third makes.

Usage: kill_tokenize.py STORE VOCABULARY FOLDER. Each run is a forked child. Prints the numbers of kills, and of
runs that found files there; exits 1 with a message at the first directory of other bytes.
"""

import json
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path

from megacell.geneformer.tokens import tokenize as module
from megacell.geneformer.vocabulary.vocabulary import Vocabulary
from megacell.store import CellStore

STEPS = ("replace", "rename", "fsync", "unlink", "mkdir")  # of os, on disk; and every record batch
CELLS_A_FILE = 40


def in_child(work: Callable[[], str]) -> str | None:
    """Return what a function says in a forked process, None if that was killed."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.write(writing, work().encode())
        except BaseException as error:
            os.write(writing, f"error: {error!r}".encode())
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        answer = pipe.read()
    return None if os.WIFSIGNALED(os.waitpid(child, 0)[1]) else answer


def run(store: CellStore, vocabulary: Vocabulary, out: Path, kill_at: int = -1) -> str:
    """Tokenize; die at one of the steps, even numbers before it, odd ones after; return their number and the lines."""
    done = 0

    def counted(real: Callable) -> Callable:
        def step(*args, **kwargs):
            nonlocal done
            if done == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
            result = real(*args, **kwargs)
            if done + 1 == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
            done += 2
            return result

        return step

    for name in STEPS:
        setattr(os, name, counted(getattr(os, name)))
    module.CELLS_AT_ONCE = CELLS_A_FILE // 2  # two record batches a file
    module._batch = counted(module._batch)
    lines = module.tokenize(store, vocabulary, out, allow_low_coverage=True, cells_a_file=CELLS_A_FILE)
    return json.dumps([done, lines])


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def main() -> None:
    store, vocabulary, folder = CellStore.open(sys.argv[1]), Vocabulary.open(sys.argv[2]), Path(sys.argv[3])
    module.tokenize(store, vocabulary, folder / "warm", allow_low_coverage=True)  # no child compiles again
    whole = folder / "whole"
    steps, _ = json.loads(in_child(lambda: run(store, vocabulary, whole)))
    kills, taken_up = 0, 0
    for first in range(steps):
        out = folder / "out"
        for kill_at in (first, first * 7 % steps):
            if not out.exists():
                kills += in_child(lambda: run(store, vocabulary, out, kill_at)) is None  # noqa: B023
        if not out.exists():  # else it was killed after its last step
            answer = in_child(lambda: run(store, vocabulary, out))  # noqa: B023
            if answer is None or answer.startswith("error"):
                sys.exit(f"killed at {first}: {answer}")
            taken_up += "files were there already" in answer
        if (folder / ".out.lock").exists():  # killed after its last step: it is taken away by who finds that out exists
            in_child(lambda: run(store, vocabulary, out))  # noqa: B023
        if contents(out) != contents(whole) or (left := [p.name for p in folder.iterdir() if p.name.startswith(".")]):
            sys.exit(f"killed at {first}: other bytes, or left behind: {left}")
        shutil.rmtree(out)
    print(json.dumps({"kills": kills, "taken_up": taken_up}))


if __name__ == "__main__":
    main()
