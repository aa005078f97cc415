# SPDX-License-Identifier: Apache-2.0
"""Cells shared out among ranks and micro-batches by what they cost, with the longest-first rule (Graham 1969)."""

import heapq
from collections.abc import Iterator

import numpy as np

from megacell.core.jit import compiled


@compiled
def _deal(order: np.ndarray, costs: np.ndarray, bins: int, bin_of: np.ndarray) -> None:
    heap = [(np.int64(0), b) for b in range(bins)]
    for i in order:
        load, lightest = heap[0]
        bin_of[i] = lightest
        heapq.heapreplace(heap, (load + costs[i], lightest))


def share_out(costs: np.ndarray, bins: int) -> np.ndarray:
    """Share cells out so that the bins cost about the same: costliest first, each to the lightest bin.

    Parameters
    ----------
    costs : int64 [n]
        Of each cell, above 0.
    bins : int
        Ranks or micro-batches.

    Returns
    -------
    np.ndarray, int64 [n]
        Bin of each cell: a function of ``costs`` and ``bins`` alone (ties: earlier cell, lower bin). With n >= bins
        no bin stays empty.
    """
    costs = np.asarray(costs, np.int64)
    bin_of = np.empty(len(costs), np.int64)
    _deal(np.argsort(-costs, kind="stable"), costs, bins, bin_of)
    return bin_of


def micro_batches(costs: np.ndarray, budget: int) -> list[np.ndarray]:
    """Cut a rank's cells into the fewest even micro-batches that cost at most ``budget``.

    Parameters
    ----------
    costs : int64 [n]
        Of each cell, none above ``budget``.
    budget : int
        Most that a micro-batch costs.

    Returns
    -------
    list of np.ndarray, int64
        The cells (0 … n - 1, ascending) of each micro-batch: ceil(cost / budget) of them, or the next number for
        which the even shares fit.
    """
    costs = np.asarray(costs, np.int64)
    bins = -(-int(costs.sum()) // budget)
    while True:
        bin_of = share_out(costs, bins)
        if not bins or np.bincount(bin_of, weights=costs, minlength=bins).max() <= budget:
            return [np.flatnonzero(bin_of == b) for b in range(bins)]
        bins += 1


def ranges_within(costs: np.ndarray, most: int) -> Iterator[tuple[int, int]]:
    """Yield ranges, in order, whose ``costs`` (int [n]) sum to at most ``most``; one above it stands alone."""
    ends, first = np.cumsum(costs), 0
    while first < len(costs):
        before = ends[first - 1] if first else 0
        last = max(first + 1, int(np.searchsorted(ends, before + most, side="right")))
        yield first, last
        first = last
