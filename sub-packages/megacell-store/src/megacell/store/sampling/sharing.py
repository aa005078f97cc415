# SPDX-License-Identifier: Apache-2.0
"""Sharing cells out among ranks and micro-batches by their cost."""

import heapq
from collections.abc import Iterator

import numpy as np

from megacell.core.jit import compiled


@compiled
def _deal(order: np.ndarray, lengths: np.ndarray, bins: int, bin_of: np.ndarray) -> None:
    heap = [(np.int64(0), b) for b in range(bins)]
    for i in order:
        load, lightest = heap[0]
        bin_of[i] = lightest
        heapq.heapreplace(heap, (load + lengths[i], lightest))


def share_out(lengths: np.ndarray, bins: int) -> np.ndarray:
    """Share cells out so that the bins' token counts come out even: longest first, each to the lightest bin.

    Parameters
    ----------
    lengths : int64 [n]
        Tokens of each cell, above 0.
    bins : int
        Ranks or micro-batches.

    Returns
    -------
    np.ndarray, int64 [n]
        Bin of each cell: a function of ``lengths`` and ``bins`` alone (ties: earlier cell, lower bin). With n >= bins
        no bin stays empty.
    """
    lengths = np.asarray(lengths, np.int64)
    bin_of = np.empty(len(lengths), np.int64)
    _deal(np.argsort(-lengths, kind="stable"), lengths, bins, bin_of)
    return bin_of


def micro_batches(lengths: np.ndarray, budget: int) -> list[np.ndarray]:
    """Cut a rank's cells into the fewest even micro-batches of at most ``budget`` tokens.

    Parameters
    ----------
    lengths : int64 [n]
        Tokens of each cell, none above ``budget``.
    budget : int
        Most tokens of a micro-batch.

    Returns
    -------
    list of np.ndarray, int64
        The cells (0 … n - 1, ascending) of each micro-batch: ceil(tokens / budget) of them, or the next number for
        which the even shares fit.
    """
    lengths = np.asarray(lengths, np.int64)
    bins = -(-int(lengths.sum()) // budget)
    while True:
        bin_of = share_out(lengths, bins)
        if not bins or np.bincount(bin_of, weights=lengths, minlength=bins).max() <= budget:
            return [np.flatnonzero(bin_of == b) for b in range(bins)]
        bins += 1


def ranges_within(lengths: np.ndarray, most: int) -> Iterator[tuple[int, int]]:
    """Yield ranges, in order, whose ``lengths`` (int [n]) sum to at most ``most``; one that is longer stands alone."""
    ends, first = np.cumsum(lengths), 0
    while first < len(lengths):
        before = ends[first - 1] if first else 0
        last = max(first + 1, int(np.searchsorted(ends, before + most, side="right")))
        yield first, last
        first = last
