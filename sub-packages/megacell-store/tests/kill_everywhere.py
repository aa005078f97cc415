# SPDX-License-Identifier: Apache-2.0
"""Run by test_crash.py: kills a conversion before and after each of its steps on disk, and looks at what is left.

Usage: kill_everywhere.py FOLDER EVERY. FOLDER holds old.h5ad and new.h5ad; every EVERY-th step is tried. Each
conversion and each look at a store is a forked child. Prints one JSON object: the numbers of kills and of
stores found old, new and absent; exits 1 with a message at the first wrong store.
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
from megacell.store.conversion import convert
from megacell.store.verify import verify

STEPS = ("replace", "rename", "fsync", "link", "unlink", "mkdir", "rmdir")


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


def make(folder: Path, store: Path, *, append: bool, kill_at: int = -1) -> str:
    """Convert; count the steps on disk; die at one of them. Even numbers die before a step, odd ones after."""
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
    files = [folder / "new.h5ad"] if append else [folder / "old.h5ad", folder / "new.h5ad"]
    convert(files, store, append=append, allow_subset=True, shard_bytes=8_000)
    return str(done)


def look(store: Path) -> str:
    """Return the generation and digest of a whole store, "absent" where there is none."""
    if not (store / "manifest.json").exists():
        return "absent"
    opened = CellStore.open(store)
    opened.rows(slice(None))
    damages = verify(store).damages
    # between the two renames of a commit the next generation's own copy is there already
    own = f"manifest-{opened.generation}.json"
    return f"{opened.generation} {opened.digest} {[d for d in damages if own not in d]}"


def main() -> None:
    folder, every = Path(sys.argv[1]), int(sys.argv[2])
    convert(folder / "old.h5ad", folder / "warm", allow_subset=True)  # what is compiled here, no child compiles again
    look(folder / "warm")
    counts = {"kills": 0, "absent": 0, "old": 0, "new": 0}
    for append in (False, True):
        before, target, whole = folder / f"before-{append}", folder / "target", folder / f"whole-{append}"
        if append:
            made = in_child(lambda: convert(folder / "old.h5ad", before, allow_subset=True).path.name)  # noqa: B023
            assert made == before.name, made
            shutil.copytree(before, whole)
        steps = in_child(lambda: make(folder, whole, append=append))  # noqa: B023
        old, new = in_child(lambda: look(before)), in_child(lambda: look(whole))  # noqa: B023
        assert steps is not None
        assert steps.isdigit(), steps
        for kill_at in range(0, int(steps), every):
            shutil.rmtree(target, ignore_errors=True)
            if append:
                shutil.copytree(before, target)
            died = in_child(lambda: make(folder, target, append=append, kill_at=kill_at))  # noqa: B023
            found = in_child(lambda: look(target))  # noqa: B023
            if died is not None or found not in (old, new):
                sys.exit(f"append {append}, step {kill_at}: {died}, found {found}, not {old} or {new}")
            counts["kills"] += 1
            counts["new" if found == new else "old" if append else "absent"] += 1
            if found == new:
                continue
            again = in_child(lambda: make(folder, target, append=append))  # noqa: B023
            found = in_child(lambda: look(target))  # noqa: B023
            left = sorted(p.name for p in target.rglob("*"))
            if found != new or left != sorted(p.name for p in whole.rglob("*")):
                sys.exit(f"append {append}, step {kill_at}, again: {again}, found {found}, not {new}; files {left}")
    print(json.dumps(counts))


if __name__ == "__main__":
    main()
