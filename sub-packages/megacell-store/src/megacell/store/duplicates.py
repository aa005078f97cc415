# SPDX-License-Identifier: Apache-2.0
"""Exact copies of cells, found by their hashes."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

EMPTY = 0  # the hash of a cell without counts; two such cells are no copies


@dataclass(frozen=True)
class Duplicates:
    """`cells` distinct cells stand in both sources, or more than once in one source named twice."""

    first: str
    second: str
    cells: int


def find_duplicates(
    hashes: np.ndarray[Any, Any], source_of: np.ndarray[Any, Any], names: Sequence[str], first_new: int = 0
) -> list[Duplicates]:
    """Return the pairs of sources that share cells.

    Parameters
    ----------
    hashes : uint64 [cells]
        Of genes and counts.
    source_of : uint32 [cells]
        Number of each cell's source.
    names : sequence of str
        By number of the source.
    first_new : int
        Pairs of sources below this number are left out.
    """
    order = np.lexsort((source_of, hashes))
    hashes, source_of = hashes[order], source_of[order]
    same = np.zeros(len(hashes) + 1, bool)
    same[1:-1] = (hashes[1:] == hashes[:-1]) & (hashes[1:] != EMPTY)
    starts, stops = np.flatnonzero(~same[:-1] & same[1:]), np.flatnonzero(same[:-1] & ~same[1:]) + 1
    pairs: dict[tuple[int, int], int] = {}
    for start, stop in zip(starts, stops, strict=True):  # only over cells that have a copy
        own, times = np.unique(source_of[start:stop], return_counts=True)
        for i, a in enumerate(own.tolist()):
            if times[i] > 1:
                pairs[a, a] = pairs.get((a, a), 0) + 1
            for b in own[i + 1 :].tolist():
                pairs[a, b] = pairs.get((a, b), 0) + 1
    return [Duplicates(names[a], names[b], n) for (a, b), n in sorted(pairs.items()) if b >= first_new]
