# SPDX-License-Identifier: Apache-2.0
"""Which cells make up global batch k, and which rank and micro-batch takes which. Nothing here reads a cell.

An epoch's order is a keyed permutation evaluated position by position: a Feistel network over the smallest power of
two that holds n, walked along its cycle until it falls below n (Black and Rogaway 2002). So an epoch of a billion
cells needs no array, and any step can be computed at once. Work is shared out by token count with the
longest-processing-time rule (Graham 1969).
"""

import heapq
from typing import Any

import numpy as np

from megacell.geneformer.compiling import compiled
from megacell.geneformer.masking import ORDER, philox_words, stream_key

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


def global_batch(step: int, size: int, n: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return global batch ``step`` of the endless sequence of shuffled epochs over n cells.

    Returns
    -------
    which : np.ndarray, int64 [size]
        Numbers from 0 to n - 1: positions step x size … step x size + size - 1 of the sequence. A batch may straddle
        two epochs.
    epochs : np.ndarray, int64 [size]
        The epoch of each.
    """
    positions = np.arange(step * size, (step + 1) * size, dtype=np.int64)
    epochs, within = positions // n, positions % n
    which = np.empty(size, np.int64)
    for epoch in range(int(epochs[0]), int(epochs[-1]) + 1):
        now = epochs == epoch
        which[now] = permuted(within[now], n, seed, epoch)
    return which, epochs


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
