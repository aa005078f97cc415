# SPDX-License-Identifier: Apache-2.0
"""An order of cells for slow disks: whole blocks in random order, mixed within a window; and how well that mixes."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class BlockShuffle:
    """Each epoch a permutation of all cells that reads blocks of neighbours: scDataset's and annbatch's idea.

    Attributes
    ----------
    cells : int
        Of the store or view.
    block : int
        Cells that are read together.
    window : int
        Blocks that are mixed with each other.
    seed : int
    """

    cells: int
    block: int = 64
    window: int = 256
    seed: int = 0

    def windows(self, epoch: int = 0) -> Iterator[Array]:
        """Yield int64 arrays of cells, a window each, in the order of the epoch: the same whenever it is asked for."""
        random = np.random.default_rng((self.seed, epoch))
        firsts = random.permutation(-(-self.cells // self.block)) * self.block
        within = np.arange(self.block)
        for start in range(0, len(firsts), self.window):
            cells = (firsts[start : start + self.window, None] + within).ravel()
            yield random.permutation(cells[cells < self.cells])

    def order(self, epoch: int = 0) -> Array:
        """Return the whole epoch's order: int64 [cells]."""
        windows = list(self.windows(epoch))
        return np.concatenate(windows) if windows else np.zeros(0, np.int64)


def mixing(order: Array, labels: Array, batch: int = 64, seed: int = 0) -> float:
    """Return how well an order mixes: the mean entropy of labels in its batches, by that of a true shuffle.

    1 is as good as a true shuffle, 0 means that each batch holds one label.

    Parameters
    ----------
    order : int64 [cells]
    labels : int [cells]
        Such as each cell's source, or donor.
    batch : int
        Cells a batch.
    """
    labels = np.unique(labels, return_inverse=True)[1]
    true = _entropy(labels[np.random.default_rng(seed).permutation(order)], batch)
    return _entropy(labels[order], batch) / true if true else 1.0


def _entropy(labels: Array, batch: int) -> float:
    """Return the mean entropy of labels, in nats, over batches."""
    of_batch = np.arange(len(labels)) // batch
    pairs, counts = np.unique(of_batch * (int(labels.max(initial=0)) + 1) + labels, return_counts=True)
    own = pairs // (int(labels.max(initial=0)) + 1)
    share = counts / np.bincount(of_batch)[own]
    return float(-(share * np.log(share)).sum() / max(1, own.max(initial=0) + 1))
