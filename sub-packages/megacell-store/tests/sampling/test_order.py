# SPDX-License-Identifier: Apache-2.0
"""The order of cells: a bijection for every size, epochs that differ, shares that are even and follow from lengths."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megacell.store.sampling.order import global_batch, permuted
from megacell.store.sampling.sharing import micro_batches, share_out


@given(n=st.integers(1, 5000), seed=st.integers(0, 2**64 - 1), epoch=st.integers(0, 2**33))
def test_the_permutation_is_a_bijection_of_every_size(n, seed, epoch):
    assert np.array_equal(np.sort(permuted(np.arange(n), n, seed, epoch)), np.arange(n))


@given(n=st.integers(1, 2**62), data=st.data())
def test_any_position_of_a_huge_epoch_is_found_at_once(n, data):
    positions = data.draw(st.lists(st.integers(0, n - 1), min_size=1, max_size=50, unique=True))
    places = permuted(np.array(positions), n, 3, 1)
    assert len(set(places.tolist())) == len(positions)
    assert places.min() >= 0
    assert places.max() < n
    assert [permuted(np.array([p]), n, 3, 1)[0] for p in positions[:3]] == places[:3].tolist()


def test_epochs_and_seeds_give_unrelated_orders():
    n, positions = 4096, np.arange(4096)
    orders = [positions, permuted(positions, n, 0, 0), permuted(positions, n, 0, 1), permuted(positions, n, 1, 0)]
    for i, one in enumerate(orders):
        for other in orders[i + 1 :]:
            assert abs(np.corrcoef(one, other)[0, 1]) < 0.08  # five standard deviations
            assert (one == other).sum() < 12  # one is expected


def test_small_sizes_reach_every_order():
    seen = {tuple(permuted(np.arange(4), 4, seed, 0)) for seed in range(500)}
    assert len(seen) == 24


@given(n=st.integers(1, 60), size=st.integers(1, 25), seed=st.integers(0, 9))
def test_batches_go_through_each_epoch_once_and_run_on_into_the_next(n, size, seed):
    steps = -(-3 * n // size)
    which, epochs = (
        np.concatenate(x) for x in zip(*(global_batch(k, size, n, seed) for k in range(steps)), strict=True)
    )
    for epoch in range(3):
        assert np.array_equal(epochs[epoch * n : (epoch + 1) * n], np.full(n, epoch))
        assert np.array_equal(which[epoch * n : (epoch + 1) * n], permuted(np.arange(n), n, seed, epoch))


LENGTHS = st.lists(st.integers(1, 4096), min_size=1, max_size=200)


@given(lengths=LENGTHS, bins=st.integers(1, 16))
def test_shares_are_as_even_as_the_longest_cell_allows(lengths, bins):
    load = np.bincount(share_out(np.array(lengths), bins), weights=lengths, minlength=bins)
    assert load.max() - load.min() <= max(lengths)
    assert (load > 0).sum() == min(bins, len(lengths))


def test_shares_follow_the_longest_first_rule():
    assert share_out(np.array([3, 9, 3, 5, 3]), 2).tolist() == [1, 0, 1, 1, 0]  # 9 + 3 against 5 + 3 + 3


def test_sixty_four_ranks_differ_by_less_than_two_percent():
    lengths = np.clip(np.random.default_rng(0).lognormal(7, 0.6, 2048), 50, 2048).astype(int)
    load = np.bincount(share_out(lengths, 64), weights=lengths)
    assert load.max() / load.mean() < 1.02


@given(lengths=LENGTHS, budget=st.integers(4096, 40_000))
def test_micro_batches_hold_every_cell_once_within_the_budget(lengths, budget):
    parts = micro_batches(np.array(lengths), budget)
    assert sorted(np.concatenate(parts).tolist()) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in part) <= budget for part in parts)
    assert all(len(part) and (np.diff(part) > 0).all() for part in parts)


@pytest.mark.parametrize(("lengths", "parts"), [([5] * 8, 4), ([5] * 7, 4), ([6, 6, 6], 3), ([], 0)])
def test_micro_batches_are_as_few_as_fit(lengths, parts):
    assert len(micro_batches(np.array(lengths, int), 10)) == parts
