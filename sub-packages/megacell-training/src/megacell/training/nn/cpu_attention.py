# SPDX-License-Identifier: Apache-2.0
"""Attention with dropout on a CPU, within each cell of a pack, that keeps no weights for the backward pass.

torch has no fused attention with dropout for CPUs: it writes the weights of all pairs of tokens out, draws each one's
fate from a generator without a counter, and keeps both. Here blocks of query rows that fit the cache are attended at a
time and computed anew in the backward pass (Dao et al. 2022, "FlashAttention"). That takes a dropout that can be
computed anew too: the fate of a weight is a pure function of (seed, query, head, key), by Philox4x32-10 as in
`megacell.geneformer.masking`, so that it depends neither on the blocks nor on the number of threads.

- the two halves of word w of Philox(counter = (64 x (j // 512) + j % 64, query token of the pack, head, 0), key = seed)
  belong to keys j of a cell with (j % 512) // 64 = 2w and 2w + 1;
- a weight is dropped when its half lies under rate x 2^16, and else divided by the share that is kept.

Shapes: T tokens of the pack, H heads of this rank, D size of a head, R query rows of a block, L tokens of their cell.
"""

import math
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch.autograd.function import once_differentiable

from megacell.core.jit import compiled
from megacell.core.rng import philox

BLOCK = 1 << 20  # weights computed at once: they stay in the processor's cache
ROWS = 64  # of a head in a block, at least: matrix products of fewer are slow, so long cells take fewer heads at once
SHARE = 1 << 16  # weights that make a thread worth its start
LANES = 64  # counters drawn at once: a loop that is vectorised
DRAWN = 8 * LANES  # fates of them
_HALF, _LOW = np.uint32(16), np.uint32(0xFFFF)


def attend_dropping(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bounds: list[int], rate: float
) -> torch.Tensor:
    """Attend within each cell, with dropout of the weights.

    Parameters
    ----------
    query, key, value : Tensor [T, H, D]
        On a CPU. Of 16 bits they are computed with in float32.
    bounds : list of int
        Where cells begin and end, from 0 to T.
    rate : float
        Share of the weights to drop, in steps of 2^-16. Drawn by a seed from torch's generator.

    Returns
    -------
    Tensor [T, H, D]
        Of the type of ``query``.
    """
    computed_in = torch.promote_types(query.dtype, torch.float32)
    heads = [x.transpose(0, 1).to(computed_in).contiguous() for x in (query, key, value)]
    seed = int(torch.empty((), dtype=torch.int64).random_())
    apply: Callable[..., torch.Tensor] = _DroppingAttention.apply
    return apply(*heads, bounds, _Dropout(rate, seed)).transpose(0, 1).to(query.dtype)


class _Dropout:
    """Decides the fates of weights [heads, R, L] whose first head and first query these are."""

    def __init__(self, rate: float, seed: int) -> None:
        self._key = np.array([seed & 0xFFFFFFFF, seed >> 32], np.uint32)
        self._under = np.uint32(round(rate * 2**16))

    def drop(self, weights: torch.Tensor, head: int, query: int) -> None:
        """Drop, in place."""
        array = weights.numpy()
        _share_out(_drop, array, head, query, self._key, self._under, self._scale(array))

    def drop_both(
        self, weights: torch.Tensor, slopes: torch.Tensor, inner: torch.Tensor, head: int, query: int
    ) -> None:
        """Drop, and make of the ``slopes``, the gradients of what was left, those of the scores, in place.

        The gradient of a softmax's scores is weight x (its gradient - the row's ``inner`` [heads, R] product of both).
        """
        array = weights.numpy()
        both = slopes.numpy(), inner.numpy()
        _share_out(_drop_both, array, *both, head, query, self._key, self._under, self._scale(array))

    def _scale(self, array: np.ndarray) -> Any:
        """Return by what weights that are kept are multiplied."""
        return array.dtype.type(1 / (1 - int(self._under) / 2**16))


class _DroppingAttention(torch.autograd.Function):
    """Query, key and value [H, T, D] to the output [H, T, D]."""

    @staticmethod
    def forward(
        ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bounds: list[int], dropout: _Dropout
    ) -> torch.Tensor:
        out = torch.empty_like(query)
        for heads, cell, blocks in _parts(bounds, len(query)):
            scaled = key[heads, cell] / math.sqrt(key.shape[-1])
            for rows in blocks:
                weights = torch.softmax(query[heads, rows] @ scaled.mT, -1)
                dropout.drop(weights, heads.start, rows.start)
                out[heads, rows] = weights @ value[heads, cell]
        ctx.save_for_backward(query, key, value, out)
        ctx.bounds, ctx.dropout = bounds, dropout
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        query, key, value, out = ctx.saved_tensors
        grad = grad.contiguous()
        inner = (grad * out).sum(-1)  # of each row of weights with its gradient
        to_query, to_key, to_value = torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)
        for heads, cell, blocks in _parts(ctx.bounds, len(query)):
            scaled = key[heads, cell] / math.sqrt(key.shape[-1])
            keys, values = torch.zeros_like(scaled), torch.zeros_like(scaled)  # added up in one piece: threads share it
            for rows in blocks:
                weights = torch.softmax(query[heads, rows] @ scaled.mT, -1)
                slopes = grad[heads, rows] @ value[heads, cell].mT
                ctx.dropout.drop_both(weights, slopes, inner[heads, rows], heads.start, rows.start)
                to_query[heads, rows] = slopes @ scaled
                keys.baddbmm_(slopes.mT, query[heads, rows])
                values.baddbmm_(weights.mT, grad[heads, rows])
            to_key[heads, cell], to_value[heads, cell] = keys / math.sqrt(key.shape[-1]), values
        return to_query, to_key, to_value, None, None


def _parts(bounds: list[int], heads: int) -> Iterator[tuple[slice, slice, list[slice]]]:
    """Yield some heads, the tokens of a cell, and the blocks of rows in which they are attended, until all were."""
    for begin, end in pairwise(bounds):
        length = end - begin
        at_once = max(1, min(heads, BLOCK // (ROWS * max(1, length))))
        for head in range(0, heads, at_once):
            own = slice(head, min(head + at_once, heads))
            blocks = min(length, -(-at_once * length * length // BLOCK))
            cuts = [begin + length * i // blocks for i in range(blocks + 1)] if length else []
            yield own, slice(begin, end), [slice(*rows) for rows in pairwise(cuts)]


def _share_out(kernel: Callable[..., None], weights: np.ndarray, *given: Any) -> None:
    """Run a kernel over the rows of all heads, by as many threads as torch uses."""
    rows = weights.shape[0] * weights.shape[1]
    threads = max(1, min(torch.get_num_threads(), weights.size // SHARE))
    cuts = [rows * i // threads for i in range(threads + 1)]
    others = [_pool(threads).submit(kernel, weights, *given, *part) for part in pairwise(cuts[1:])]
    kernel(weights, *given, 0, cuts[1])
    for other in others:
        other.result()


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="megacell-dropout")


@compiled
def _draw(length: int, query: int, head: int, key: np.ndarray, under: Any, kept: np.ndarray) -> None:
    """Write which weights of a row are kept; ``kept`` holds `DRAWN` more."""
    row, column = np.uint32(query), np.uint32(head)
    for block in range((length + DRAWN - 1) // DRAWN):
        first = block * DRAWN
        for lane in range(LANES):
            a, b, c, d = philox(np.uint32(block * LANES + lane), row, column, np.uint32(0), key[0], key[1])
            kept[first + lane] = (a & _LOW) >= under
            kept[first + LANES + lane] = (a >> _HALF) >= under
            kept[first + 2 * LANES + lane] = (b & _LOW) >= under
            kept[first + 3 * LANES + lane] = (b >> _HALF) >= under
            kept[first + 4 * LANES + lane] = (c & _LOW) >= under
            kept[first + 5 * LANES + lane] = (c >> _HALF) >= under
            kept[first + 6 * LANES + lane] = (d & _LOW) >= under
            kept[first + 7 * LANES + lane] = (d >> _HALF) >= under


@compiled
def _drop(
    weights: np.ndarray, head: int, query: int, key: np.ndarray, under: Any, scale: Any, begin: int, end: int
) -> None:
    """Drop in rows ``begin`` to ``end`` of all heads'."""
    _, rows, length = weights.shape
    kept = np.empty(length + DRAWN, np.bool_)
    for number in range(begin, end):
        h, i = number // rows, number % rows
        _draw(length, query + i, head + h, key, under, kept)
        own = weights[h, i]
        for j in range(length):
            own[j] = own[j] * scale if kept[j] else 0 * scale


@compiled
def _drop_both(
    weights: np.ndarray,
    slopes: np.ndarray,
    inner: np.ndarray,
    head: int,
    query: int,
    key: np.ndarray,
    under: Any,
    scale: Any,
    begin: int,
    end: int,
) -> None:
    """As `_Dropout.drop_both`, in rows ``begin`` to ``end`` of all heads'."""
    _, rows, length = weights.shape
    kept = np.empty(length + DRAWN, np.bool_)
    for number in range(begin, end):
        h, i = number // rows, number % rows
        _draw(length, query + i, head + h, key, under, kept)
        own, slope, mean = weights[h, i], slopes[h, i], inner[h, i]
        for j in range(length):
            times = scale if kept[j] else 0 * scale
            slope[j] = own[j] * (slope[j] * times - mean)
            own[j] *= times
