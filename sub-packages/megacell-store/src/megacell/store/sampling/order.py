# SPDX-License-Identifier: Apache-2.0
"""Which cells make up global batch k, as a function of k alone: shuffled, in blocks, or by weight. Reads no cell.

An epoch's order is a keyed permutation evaluated position by position: a Feistel network over the smallest power of
two that holds n, walked along its cycle until it falls below n (Black and Rogaway 2002). So an epoch of a billion
cells needs no array, and any step can be computed at once.
"""

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import pandas as pd

from megacell.core.errors import UsageError
from megacell.core.jit import compiled
from megacell.core.rng import ORDER, philox, philox_words, stream_key
from megacell.store.read.reader import CellReader
from megacell.store.sampling.cell_set import CellSet, column_of

ROUNDS = 8


@compiled
def _mixed(half: Any, key: Any) -> Any:
    """Mix one half with a round's key: MurmurHash3's 64-bit finaliser."""
    x = half ^ key
    x = (x ^ (x >> np.uint64(33))) * np.uint64(0xFF51AFD7ED558CCD)
    x = (x ^ (x >> np.uint64(33))) * np.uint64(0xC4CEB9FE1A85EC53)
    return x ^ (x >> np.uint64(33))


@compiled
def _permute(
    positions: np.ndarray, n: Any, left_bits: Any, right_bits: Any, keys: np.ndarray, places: np.ndarray
) -> None:
    """Write to ``places`` where each of ``positions`` (all under n) goes; arrays are uint64, keys [ROUNDS]."""
    one = np.uint64(1)
    left_mask, right_mask = (one << left_bits) - one, (one << right_bits) - one
    for i in range(len(positions)):
        x = positions[i]
        while True:
            left, right = x >> right_bits, x & right_mask
            for r in range(0, ROUNDS, 2):
                left ^= _mixed(right, keys[r]) & left_mask
                right ^= _mixed(left, keys[r + 1]) & right_mask
            x = (left << right_bits) | right
            if x < n:
                break
        places[i] = x


def permuted(positions: np.ndarray, n: int, seed: int, epoch: int) -> np.ndarray:
    """Return where a keyed permutation of 0 … n - 1 sends each position.

    Parameters
    ----------
    positions : integers [m]
        Each from 0 to n - 1.
    n : int
        From 1 to 2^62.
    seed, epoch : int
        The key: another seed or epoch gives another permutation.

    Returns
    -------
    np.ndarray, int64 [m]
    """
    key = stream_key(seed, epoch, ORDER)
    words = [philox_words(np.array([r, 0, 0, 0], np.uint32), key)[:2] for r in range(ROUNDS)]
    keys = np.concatenate(words).view(np.uint64)
    bits = max(2, (n - 1).bit_length())
    places = np.empty(len(positions), np.uint64)
    left = bits // 2
    _permute(
        np.asarray(positions).astype(np.uint64), np.uint64(n), np.uint64(left), np.uint64(bits - left), keys, places
    )
    return places.astype(np.int64)


class Order(Protocol):
    """Which of n cells stand where in an endless sequence of epochs: a pure function of the position."""

    def draw(self, positions: np.ndarray, n: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
        """Return which cell (0 … n - 1) stands at each of consecutive positions, and its epoch, both int64."""


class Shuffled:
    """Each epoch goes through all cells in an order of its own."""

    def draw(self, positions: np.ndarray, n: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
        """See `Order`."""
        epochs, within = positions // n, positions % n
        which = np.empty(len(positions), np.int64)
        for epoch in range(int(epochs[0]), int(epochs[-1]) + 1):
            now = epochs == epoch
            which[now] = permuted(within[now], n, seed, epoch)
        return which, epochs


@dataclass(frozen=True)
class BlockShuffled:
    """Blocks of neighbouring cells are shuffled, and then the cells of so many blocks among each other.

    For stores on disks that are slow at reading here and there. Each epoch goes through all cells once.

    Attributes
    ----------
    block : int
        Cells that are neighbours in the store.
    blocks : int
        Whose cells are shuffled among each other.
    """

    block: int
    blocks: int

    def __post_init__(self) -> None:
        if self.block < 1 or self.blocks < 1:
            raise UsageError(f"order: {self.blocks} blocks of {self.block} cells; give 1 or more of both")

    def __str__(self) -> str:
        return (
            f"order: blocks of {self.block:,} neighbouring cells, the cells of {self.blocks:,} shuffled together; "
            f"two of these are of different blocks with a probability of {self.mixing:.3f}"
        )

    @property
    def mixing(self) -> float:
        """Probability that two cells of a window come from different blocks; 1 is what a full shuffle tends to."""
        window = self.block * self.blocks
        return 1.0 - (self.block - 1) / max(window - 1, 1)

    def draw(self, positions: np.ndarray, n: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
        """See `Order`."""
        epochs, within = positions // n, positions % n
        window, whole = self.block * self.blocks, n // self.block
        which = np.empty(len(positions), np.int64)
        for epoch in range(int(epochs[0]), int(epochs[-1]) + 1):
            now = np.flatnonzero(epochs == epoch)
            places = within[now]
            for first in range(int(places[0]) // window * window, int(places[-1]) + 1, window):
                here = (places >= first) & (places < first + window)
                size = min(window, n - first)
                # an order of its own for each window: epochs of the blocks' order count up from 0, these down from 2^64
                key = 2**64 - 1 - (epoch * (-(-n // window)) + first // window)
                places[here] = first + permuted(places[here] - first, size, seed, key)
            inside = places < whole * self.block  # the cells beyond the last whole block stay at the end
            blocks = permuted(places[inside] // self.block, max(whole, 1), seed, epoch)
            places[inside] = blocks * self.block + places[inside] % self.block
            which[now] = places
        return which, epochs


class Weighted:
    """Cells are drawn with replacement, each with a probability of its group.

    Parameters
    ----------
    groups : integers [n]
        Group of each cell, from 0; below 0: never drawn.
    weights : float [groups], optional
        How often a cell of each group is to come, as shares; equal by default. Groups without cells have none.

    Raises
    ------
    UsageError
        Weights that are negative or leave nothing to draw.
    """

    def __init__(self, groups: np.ndarray, weights: np.ndarray | None = None) -> None:
        sizes = np.bincount(groups[groups >= 0])
        shares = np.ones(len(sizes)) if weights is None else np.asarray(weights, float)
        if len(shares) != len(sizes) or not (np.isfinite(shares).all() and (shares >= 0).all()):
            raise UsageError(f"order: {len(shares)} weights for {len(sizes)} groups; give one of 0 or more each")
        shares = np.where(sizes > 0, shares, 0.0)
        if not shares.sum() > 0:
            raise UsageError("order: no group with cells has a weight above 0; raise one")
        self._ends = np.cumsum(shares) / shares.sum()
        self._ends[np.flatnonzero(shares)[-1] :] = 1.0
        self._sizes, self._shares = sizes, shares / shares.sum()
        self._starts = np.cumsum(sizes) - sizes + int((groups < 0).sum())
        self._by_group = np.argsort(groups, kind="stable").astype(np.uint32 if len(groups) < 2**32 else np.int64)

    @property
    def effective_cells(self) -> float:
        """How many cells drawn equally often would vary as little (Kish's effective sample size)."""
        drawn = self._shares > 0
        return float(1 / (self._shares[drawn] ** 2 / self._sizes[drawn]).sum())

    def draw(self, positions: np.ndarray, n: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
        """See `Order`; each draw is an epoch of its own, so that a cell drawn twice has other random numbers."""
        if n != len(self._by_group):
            raise UsageError(f"order: groups of {len(self._by_group)} cells for a stream of {n}; give one a cell")
        uniform = _uniform(positions.astype(np.uint64), stream_key(seed, 0, ORDER))
        group = np.searchsorted(self._ends, uniform[0], side="right")
        within = (uniform[1] * self._sizes[group]).astype(np.int64)
        return self._by_group[self._starts[group] + within].astype(np.int64), positions


@compiled
def _uniform(positions: np.ndarray, key: np.ndarray) -> np.ndarray:
    """Return two numbers from 0 to below 1 for each position, float64 [2, m]."""
    drawn = np.empty((2, len(positions)))
    for i in range(len(positions)):
        low, high = np.uint32(positions[i]), np.uint32(positions[i] >> np.uint64(32))
        a, b, c, d = philox(low, high, np.uint32(0), np.uint32(2), key[0], key[1])
        drawn[0, i] = ((np.uint64(a) << np.uint64(21)) ^ (np.uint64(b) >> np.uint64(11))) * 2.0**-53
        drawn[1, i] = ((np.uint64(c) << np.uint64(21)) ^ (np.uint64(d) >> np.uint64(11))) * 2.0**-53
    return drawn


def global_batch(step: int, size: int, n: int, seed: int, order: Order | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Return global batch ``step`` of the endless sequence of epochs over n cells.

    Returns
    -------
    which : np.ndarray, int64 [size]
        Numbers from 0 to n - 1: positions step x size … step x size + size - 1 of the sequence. A batch may straddle
        two epochs.
    epochs : np.ndarray, int64 [size]
        The epoch of each one's random numbers.
    """
    positions = np.arange(step * size, (step + 1) * size, dtype=np.int64)
    return (order or Shuffled()).draw(positions, n, seed)


def some_of(cells: np.ndarray, most: int, seed: int) -> np.ndarray:
    """Return at most ``most`` of the cells, drawn by ``seed`` from all of them, in their order."""
    if len(cells) <= most:
        return cells
    return np.sort(np.random.default_rng(seed).choice(cells, most, replace=False))


def balanced(store: CellReader, column: str, cells: CellSet) -> tuple[Weighted, str]:
    """Return the order that draws each value of a column of obs as often as every other, and a line for the log.

    Cells without a value are one group more.
    """
    codes, values = pd.factorize(column_of(store, column), use_na_sentinel=False)
    groups = codes[cells[:]]
    sizes = np.bincount(groups, minlength=len(values))
    if (sizes > 0).sum() < 2:
        raise UsageError(f"data.balance={column}: all {len(cells):,} cells to train on have one value; leave it out")
    order = Weighted(groups)
    missing = sizes[pd.isna(values)].sum()
    without = f" (the {missing:,} without a value are one)" if missing else ""
    return order, (
        f"balanced by {column}: {(sizes > 0).sum():,} groups{without} of {sizes[sizes > 0].min():,} to {sizes.max():,} "
        f"cells, each drawn as often, with replacement; the effective share of the {len(cells):,} cells to train on is "
        f"{order.effective_cells / len(cells):.1%}"
    )
