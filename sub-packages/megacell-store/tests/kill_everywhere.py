# SPDX-License-Identifier: Apache-2.0
"""Run by the tests: kills a writer of a store before and after each of its steps on disk, and looks at what is left.

Usage: kill_everywhere.py FOLDER EVERY CASE... FOLDER holds old.h5ad and new.h5ad, both with a graph in obsp; every
EVERY-th step is tried of each case: "new" (a conversion), "append", "compact" or "prune". Each writer and each look at
a store is a forked child. Prints one JSON object: the numbers of kills and of stores found old, new and absent; exits
1 with a message at the first wrong store.
"""

import json
import os
import shutil
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

from megacell.store.cells import CellStore
from megacell.store.compaction import compact
from megacell.store.conversion import convert
from megacell.store.verify import verify

STEPS = ("replace", "rename", "fsync", "link", "unlink", "mkdir", "rmdir")
OPTIONS = {"allow_subset": True, "shard_bytes": 8_000, "neighbours": "distances"}


def in_child(work: Callable[[], str]) -> str | None:
    """Return what a function says in a forked process, None if that was killed."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.write(writing, work().encode())
        except BaseException:
            os.write(writing, ("error: " + traceback.format_exc()).encode())
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        answer = pipe.read()
    status = os.waitpid(child, 0)[1]
    return None if os.WIFSIGNALED(status) else answer


def begin(folder: Path, store: Path, case: str) -> str:
    """Make the store that the case's writer meets, if it meets one."""
    if case != "new":
        convert(folder / "old.h5ad", store, **OPTIONS)
    if case in ("compact", "prune"):
        convert(folder / "new.h5ad", store, append=True, **OPTIONS)
    if case == "prune":
        compact(store)
    return "begun"


def write(folder: Path, store: Path, case: str) -> None:
    """Do what the case is about; `begin` came before."""
    if case == "new":
        convert([folder / "old.h5ad", folder / "new.h5ad"], store, **OPTIONS)
    elif case == "append":
        convert(folder / "new.h5ad", store, append=True, **OPTIONS)
    else:
        compact(store, prune=case == "prune", older_than=0)


def make(folder: Path, store: Path, case: str, kill_at: int = -1) -> str:
    """Write; count the steps on disk; die at one of them. Even numbers die before a step, odd ones after."""
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
    write(folder, store, case)
    return str(done)


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


def try_case(folder: Path, case: str, every: int, counts: dict[str, int]) -> None:
    """Kill a case's writer at every so-many-th step."""
    before, target, whole = folder / f"before-{case}", folder / "target", folder / f"whole-{case}"
    begun = in_child(lambda: begin(folder, before, case))
    assert begun == "begun", begun
    if before.exists():
        shutil.copytree(before, whole)
    steps = in_child(lambda: make(folder, whole, case))
    old, new = in_child(lambda: look(before)), in_child(lambda: look(whole))
    assert steps is not None
    assert steps.isdigit(), steps
    assert old != new
    for kill_at in range(0, int(steps), every):
        shutil.rmtree(target, ignore_errors=True)
        if before.exists():
            shutil.copytree(before, target)
        died = in_child(lambda at=kill_at: make(folder, target, case, at))
        found = in_child(lambda: look(target))
        if died is not None or found not in (old, new):
            sys.exit(f"{case}, step {kill_at}: {died}, found {found}, not {old} or {new}")
        counts["kills"] += 1
        counts["new" if found == new else "absent" if case == "new" else "old"] += 1
        if found == new and case in ("new", "append"):
            continue  # a second conversion of the same files would be another request
        again = in_child(lambda: make(folder, target, case))
        found = in_child(lambda: look(target))
        left = sorted(p.name for p in target.rglob("*"))
        if found != new or left != sorted(p.name for p in whole.rglob("*")):
            sys.exit(f"{case}, step {kill_at}, again: {again}, found {found}, not {new}; files {left}")


def main() -> None:
    folder, every, *cases = Path(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:]
    for case in ("new", "append", "compact"):  # what is compiled here, no child compiles again
        begin(folder, folder / f"warm-{case}", case)
        write(folder, folder / f"warm-{case}", case)
        look(folder / f"warm-{case}")
    counts = {"kills": 0, "absent": 0, "old": 0, "new": 0}
    for case in cases:
        try_case(folder, case, every, counts)
    print(json.dumps(counts))


if __name__ == "__main__":
    main()
