# SPDX-License-Identifier: Apache-2.0
"""Exact copies of cells, found by their hashes, within a store and between two."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megacell.store.format.manifest import Manifest
from megacell.store.read.mapped_shard import map_cells, map_sources

Array = np.ndarray[Any, Any]
EMPTY = 0  # the hash of a cell without counts; two such cells are no copies
AT_ONCE = 4 << 20  # cells sorted at once: a share of the hashes by their first bits, so memory stays bounded


@dataclass(frozen=True)
class Duplicates:
    """`cells` distinct cells stand in both sources, or more than once in one source named twice."""

    first: str
    second: str
    cells: int

    def __str__(self) -> str:
        where = f"{self.first} and {self.second}" if self.first != self.second else f"{self.first} more than once"
        return f"{self.cells:,} cells stand in {where}"


def duplicates_of(store: Path, manifest: Manifest, first_new: int = 0) -> list[Duplicates]:
    """Return the pairs of a store's sources that share cells, those below number `first_new` left out."""
    pairs: dict[tuple[int, int], int] = {}
    for hashes, source_of in _shares(store, manifest):
        for pair, n in count_pairs(hashes, source_of).items():
            pairs[pair] = pairs.get(pair, 0) + n
    names = [source.name for source in manifest.sources]
    return [Duplicates(names[a], names[b], n) for (a, b), n in sorted(pairs.items()) if b >= first_new]


def _shares(store: Path, manifest: Manifest) -> Iterator[tuple[Array, Array]]:
    """Yield hashes and sources of all cells, those with equal first bits together."""
    bits = max(0, (manifest.cells // AT_ONCE).bit_length())
    for share in range(1 << bits):
        hashes, sources = [], []
        for shard in manifest.shards:
            own = map_cells(store, shard, "cell_hash.npy")
            panels = map_sources(store, shard, len(manifest.sources))
            here = slice(None) if not bits else (own >> np.uint64(64 - bits)) == share
            hashes.append(own[here])
            sources.append(panels[here])
        yield np.concatenate(hashes or [np.zeros(0, np.uint64)]), np.concatenate(sources or [np.zeros(0, np.uint32)])


def count_pairs(hashes: Array, source_of: Array) -> dict[tuple[int, int], int]:
    """Return the number of distinct cells that each pair of sources shares, (a, a) for copies within a.

    Parameters
    ----------
    hashes : uint64 [cells]
    source_of : uint32 [cells]
    """
    order = np.lexsort((source_of, hashes))
    hashes, source_of = hashes[order], source_of[order].astype(np.int64)
    twice = np.zeros(len(hashes), bool)
    same = (hashes[1:] == hashes[:-1]) & (hashes[1:] != EMPTY)
    twice[1:] |= same
    twice[:-1] |= same
    hashes, source_of = hashes[twice], source_of[twice]
    new = np.ones(len(hashes), bool)  # the first of each cell in each source
    new[1:] = (hashes[1:] != hashes[:-1]) | (source_of[1:] != source_of[:-1])
    times = np.diff(np.append(np.flatnonzero(new), len(hashes)))
    hashes, source_of = hashes[new], source_of[new]
    found = [(source_of[times > 1], source_of[times > 1])]
    step = 1
    while step < len(hashes) and (near := hashes[step:] == hashes[:-step]).any():
        found.append((source_of[:-step][near], source_of[step:][near]))
        step += 1
    first, second = (np.concatenate(own) for own in zip(*found, strict=True))
    pairs, counts = np.unique(np.stack([first, second]), axis=1, return_counts=True)
    return {(int(a), int(b)): int(n) for a, b, n in zip(*pairs, counts, strict=True)}


def held(wanted: Array, store: Path, manifest: Manifest) -> Array:
    """Return which hashes a store holds: bool [n]; a cell without counts is held by none.

    Parameters
    ----------
    wanted : uint64 [n]
    """
    order = np.argsort(wanted)
    ordered, found = wanted[order], np.zeros(len(wanted), bool)
    for shard in manifest.shards:
        own = map_cells(store, shard, "cell_hash.npy")
        for start in range(0, len(own), AT_ONCE):
            piece = np.unique(own[start : start + AT_ONCE])
            low, high = (np.searchsorted(ordered, piece, side=side) for side in ("left", "right"))
            hit = high > low
            marks = np.zeros(len(ordered) + 1, np.int64)
            np.add.at(marks, low[hit], 1)
            np.add.at(marks, high[hit], -1)
            found |= np.cumsum(marks[:-1]) > 0
    out = np.zeros(len(wanted), bool)
    out[order] = found & (ordered != EMPTY)
    return out
