# SPDX-License-Identifier: Apache-2.0
"""Run by test_kills.py: kills a writer of a store before and after each of its steps on disk; looks at what is left.

Usage: kill_everywhere.py FOLDER SCENARIO WHO EVERY. FOLDER holds old, new, fractions and late .h5ad, with a graph in
obsp; every EVERY-th step is tried. WHO is killed: "all", the writer and its worker at once, or "one", whichever of the
two takes the step, so that the other one goes on. After each kill there has to be the old store or the new one, and
the same work, started at once, has to make the store that is made undisturbed, file by file and byte by byte. Prints
one JSON object: the numbers of kills, those of them in a worker, and of stores found old, new and absent.
"""

import json
import mmap
import os
import shutil
import signal
import struct
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

from megacell.core.errors import MegacellError
from megacell.core.files import hash_file
from megacell.store.conversion.conversion import convert
from megacell.store.conversion.warm_up import prepare
from megacell.store.format.verify import verify
from megacell.store.maintain.compaction import compact
from megacell.store.read.cell_store import CellStore
from megacell.store.sources import choice

STEPS = ("replace", "rename", "fsync", "link", "unlink", "mkdir", "rmdir")
OPTIONS = {"allow_subset": True, "shard_bytes": 8_000, "neighbours": "distances"}
SCENARIOS = {
    "new": lambda folder, store: convert([folder / "old.h5ad", folder / "new.h5ad"], store, **OPTIONS),
    "append": lambda folder, store: convert([folder / "new.h5ad"], store, append=True, **OPTIONS),
    "parts": lambda folder, store: in_parts(folder, store),
    # fractions and a bad value that the first look does not see: shards are made again
    "amended": lambda folder, store: convert(
        [folder / "old.h5ad", folder / "new.h5ad", folder / "fractions.h5ad", folder / "late.h5ad"],
        store,
        skip_bad=True,
        **OPTIONS,
    ),
    "compact": lambda _, store: compact(store),
    "prune": lambda _, store: compact(store, prune=True, older_than=0),
}


class Steps:
    """Counts the steps of all processes of a conversion, and kills at one of them: even numbers before the step, odd
    ones after it.
    """

    def __init__(self, kill_at: int = -1, who: str = "all") -> None:
        self._memory = mmap.mmap(-1, 16)  # shared by processes that are forked from here
        self.kill_at, self.who, self.first = kill_at, who, os.getpid()

    @property
    def done(self) -> int:
        return int(struct.unpack_from("q", self._memory)[0])

    @property
    def in_worker(self) -> bool:
        return bool(struct.unpack_from("q", self._memory, 8)[0])

    def watch(self) -> None:
        self.first = os.getpid()
        for name in STEPS:
            setattr(os, name, self._counted(getattr(os, name)))

    def _counted(self, real: Callable) -> Callable:
        def step(*args, **kwargs):
            mine = self.done
            struct.pack_into("q", self._memory, 0, mine + 2)
            self._die(mine)
            try:
                return real(*args, **kwargs)
            finally:
                self._die(mine + 1)

        return step

    def _die(self, step: int) -> None:
        if step == self.kill_at:
            struct.pack_into("q", self._memory, 8, int(os.getpid() != self.first))
            os.kill(0 if self.who == "all" else os.getpid(), signal.SIGKILL)


def in_child(work: Callable[[], str], answers: Path) -> str | None:
    """Return what a function says in a forked process with a group of its own, None if that was killed."""
    answers.unlink(missing_ok=True)
    child = os.fork()
    if child == 0:
        os.setpgid(0, 0)
        try:
            answer = work()
        except MegacellError as error:
            answer = f"refused: {error}"
        except BaseException:
            answer = "error: " + traceback.format_exc()
        with open(answers, "w") as file:
            file.write(answer)
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    return None if os.WIFSIGNALED(status) else answers.read_text()


def begin(scenario: str, folder: Path, store: Path) -> str:
    """Make the store that the scenario's writer meets, if it meets one."""
    if scenario in ("append", "compact", "prune"):
        convert(folder / "old.h5ad", store, **OPTIONS)
    if scenario in ("compact", "prune"):
        convert(folder / "new.h5ad", store, append=True, **OPTIONS)
    if scenario == "prune":
        compact(store)
    return "begun"


def in_parts(folder: Path, store: Path) -> None:
    files = [folder / "old.h5ad", folder / "new.h5ad"]
    for number in (1, 2):
        convert(files, store, part=(number, 2), **OPTIONS)
    convert(files, store, finish=True, **OPTIONS)


def make(scenario: str, folder: Path, store: Path, steps: Steps) -> str:
    steps.watch()
    SCENARIOS[scenario](folder, store)
    return "made"


def tree(store: Path) -> dict[str, str]:
    """Return the hash of every file of a store."""
    return {path.relative_to(store).as_posix(): hash_file(path) for path in store.rglob("*") if path.is_file()}


def look(store: Path) -> str:
    """Return the generation and digest of a whole store, "absent" where there is none."""
    if not (store / "manifest.json").exists():
        return "absent"
    opened = CellStore.open(store)
    opened.rows(slice(None))
    opened.neighbours("distances").rows(slice(None))
    damages = verify(store).damages
    # between the two renames of a commit the next generation's own copy is there already
    own = f"manifest-{opened.generation}.json"
    return f"{opened.generation} {opened.digest} {[d for d in damages if own not in d]}"


def main() -> None:
    folder, scenario, who, every = Path(sys.argv[1]), sys.argv[2], sys.argv[3], int(sys.argv[4])
    choice.SAMPLE_RUNS = 1  # so that the first look does not see what turns up late
    prepare()
    begin(scenario, folder, folder / "warm")
    SCENARIOS[scenario](folder, folder / "warm")  # what is compiled here, no child compiles again
    look(folder / "warm")
    before, target, whole, answers = (folder / name for name in ("before", "target", "whole", "answers"))
    begun = in_child(lambda: begin(scenario, folder, before), answers)
    assert begun == "begun", begun
    if before.exists():
        shutil.copytree(before, whole)
    steps = Steps()
    made = in_child(lambda: make(scenario, folder, whole, steps), answers)
    assert made == "made", made
    old, new, expected = in_child(lambda: look(before), answers), in_child(lambda: look(whole), answers), tree(whole)
    counts = {"steps": steps.done, "kills": 0, "in a worker": 0, "absent": 0, "old": 0, "new": 0}
    for kill_at in range(0, steps.done, every):
        shutil.rmtree(target, ignore_errors=True)
        if before.exists():
            shutil.copytree(before, target)
        killed = Steps(kill_at, who)
        died = in_child(lambda: make(scenario, folder, target, killed), answers)  # noqa: B023
        # alone, a worker's death is an error of the conversion
        as_expected = died is None or (killed.in_worker and who == "one" and died.startswith("refused: a process"))
        found = in_child(lambda: look(target), answers)
        where = f"{scenario}, {who} killed at step {kill_at}{' of a worker' * killed.in_worker}"
        if not as_expected or found not in (old, new):
            sys.exit(f"{where}: {died}, found {found}, not {old} or {new}")
        counts["kills"] += 1
        counts["in a worker"] += killed.in_worker
        counts["new" if found == new else "old" if before.exists() else "absent"] += 1
        if found == new and scenario not in ("compact", "prune"):
            continue  # a second conversion of the same files would be another request
        again = in_child(lambda: make(scenario, folder, target, Steps()), answers)
        left = tree(target) if target.exists() else {}
        if again != "made" or left != expected:
            differ = sorted(name for name in {*left, *expected} if left.get(name) != expected.get(name))
            sys.exit(f"{where}, again: {again}; these files differ: {differ}")
    print(json.dumps(counts))


if __name__ == "__main__":
    main()
