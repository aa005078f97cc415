# SPDX-License-Identifier: Apache-2.0
"""Attention with dropout on a CPU, against a reference that keeps all weights and draws their fates by Philox."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from reference_philox import reference_philox
from scipy.stats import binom

from megacell.training.nn import cpu_attention as dropping_attention
from megacell.training.nn.cpu_attention import attend_dropping

BOUNDS = [0, 1, 8, 8, 530, 547]  # a cell of one token, one without any, and one of more than are drawn at once
HEADS, SIZE = 2, 4


def tensors(dtype=torch.float64, tokens=BOUNDS[-1]):
    """Query, key, value and a weight for each output [T, H, D]."""
    generator = torch.Generator().manual_seed(1)
    made = torch.randn((4, tokens, HEADS, SIZE), generator=generator, dtype=torch.float64).to(dtype)
    return [x.clone().requires_grad_() for x in made]


def run(attend, given, seed=5):
    """Return the output and the gradients of query, key and value."""
    torch.manual_seed(seed)
    *inputs, weights = given
    out = attend(*inputs)
    return [out.detach(), *torch.autograd.grad((out * weights).sum(), inputs)]


def fates(seed, query, head, length, rate):
    """Say of a row's weights which are kept, by the definition."""
    key = (seed & 0xFFFFFFFF, seed >> 32)
    counters = {64 * (j // 512) + j % 64 for j in range(length)}
    words = {counter: reference_philox((counter, query, head, 0), key) for counter in counters}

    def half(j):
        which = j % 512 // 64
        return words[64 * (j // 512) + j % 64][which // 2] >> 16 * (which % 2) & 0xFFFF

    return [half(j) >= round(rate * 65536) for j in range(length)]


def reference(query, key, value, rate):
    """Attend with all weights written out."""
    seed = int(torch.empty((), dtype=torch.int64).random_())
    kept = 1 - round(rate * 65536) / 65536
    cells = []
    for begin, end in pairwise(BOUNDS):
        q, k, v = (x[begin:end].transpose(0, 1) for x in (query, key, value))
        weights = torch.softmax(q @ k.mT / math.sqrt(SIZE), -1)
        rows = [[fates(seed, begin + i, h, end - begin, rate) for i in range(end - begin)] for h in range(HEADS)]
        stay = torch.tensor(rows, dtype=torch.float64).reshape(weights.shape)
        cells.append((weights * stay / kept @ v).transpose(0, 1))
    return torch.cat(cells)


@pytest.fixture(scope="module")
def expected():
    return run(lambda *qkv: reference(*qkv, 0.3), tensors())


@pytest.mark.parametrize("block", [1, 5000, 1 << 20], ids="blocks of {} weights".format)
@pytest.mark.parametrize("threads", [1, 3], ids="{} threads".format)
@pytest.mark.parametrize("rows", [1, 64], ids="rows of at least {}".format)
def test_output_and_gradients_are_those_of_the_definition(expected, block, threads, rows, monkeypatch):
    monkeypatch.setattr(dropping_attention, "BLOCK", block)
    monkeypatch.setattr(dropping_attention, "SHARE", 1)
    monkeypatch.setattr(dropping_attention, "ROWS", rows)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    ours = run(lambda *qkv: attend_dropping(*qkv, BOUNDS, 0.3), tensors())
    for one, other in zip(ours, expected, strict=True):
        assert one.dtype == torch.float64
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("dtype", "most"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2), (torch.float16, 2e-3)])
def test_other_types_come_near(expected, dtype, most):
    ours = run(lambda *qkv: attend_dropping(*qkv, BOUNDS, 0.3), tensors(dtype))
    for one, other in zip(ours, expected, strict=True):
        assert one.dtype == dtype
        assert float((one.double() - other).norm() / other.norm()) < most


def test_the_seed_is_torchs_and_each_call_draws_anew():
    given = tensors(torch.float32)
    attend = lambda *qkv: attend_dropping(*qkv, BOUNDS, 0.3)  # noqa: E731
    one, same, other = run(attend, given), run(attend, given), run(attend, given, seed=6)
    for a, b, c in zip(one, same, other, strict=True):
        assert torch.equal(a, b)
        assert not torch.equal(a, c)
    torch.manual_seed(5)
    assert not torch.equal(attend(*given[:3]), attend(*given[:3]))


@pytest.mark.parametrize("rate", [0.02, 0.1, 0.5])
def test_the_share_of_dropped_weights_is_the_rate(rate):
    length, heads = 700, 3
    query, key = torch.zeros(length, heads, length), torch.randn(length, heads, length)
    value = torch.eye(length)[:, None].expand(-1, heads, -1)  # the output is the weights
    weights = attend_dropping(query, key, value, [0, length], rate)
    dropped, n = int((weights == 0).sum()), weights.numel()
    low, high = binom.ppf([1e-6, 1 - 1e-6], n, round(rate * 65536) / 65536)
    assert low <= dropped <= high
    torch.testing.assert_close(
        weights[weights > 0], torch.tensor(1 / length / (1 - rate)).expand(n - dropped), rtol=1e-4, atol=0
    )
    by_head = (weights == 0).sum((0, 2)).numpy()
    assert len(np.unique(by_head)) > 1  # heads draw each for itself


def test_nothing_of_the_size_of_the_weights_is_kept_for_the_backward_pass():
    given = tensors(torch.float32)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):
        attend_dropping(*given[:3], BOUNDS, 0.3)
    assert kept
    assert max(kept) <= given[0].numel()
