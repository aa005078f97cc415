# SPDX-License-Identifier: Apache-2.0
"""One rank of torchrun's, pinned to cores of its own: runs the `main` of a module with the words that follow.

    torchrun --standalone --nproc-per-node RANKS run_pinned.py FIRST CORES MODULE WORD...

FIRST: the core of rank 0, counted among those that this process may use. CORES: of each rank.
"""

import importlib
import os
import sys


def cores_of(rank: int, first: int, cores: int) -> set[int]:
    """Return the cores of a rank; ValueError where there are not as many."""
    usable = sorted(os.sched_getaffinity(0))
    own = usable[first + rank * cores : first + (rank + 1) * cores]
    if len(own) < cores:
        raise ValueError(f"rank {rank} of {cores} core(s), from core {first} on: this process may use {len(usable)}")
    return set(own)


if __name__ == "__main__":
    _, first, cores, module, *words = sys.argv
    os.sched_setaffinity(0, cores_of(int(os.environ["LOCAL_RANK"]), int(first), int(cores)))
    sys.exit(importlib.import_module(module).main(words))
