# SPDX-License-Identifier: Apache-2.0
"""Gene frequency and rank frequency: by hand, as probabilities, and kept in a file."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megacell.core.errors import DataError
from megacell.geneformer.baselines.frequency import RANK_BINS, TokenFrequency, frequency_log_prior

SIZE = 9
GENES = np.array([2, 4, 5, 6, 8])  # 0, 1, 3 and 7 are specials
cells_of_genes = st.lists(st.lists(st.sampled_from(GENES.tolist()), unique=True), max_size=12)


def flat(cells: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
    return np.array(list(itertools.chain(*cells)), dtype=np.int32), np.cumsum([0, *map(len, cells)])


def fitted(cells: list[list[int]]) -> TokenFrequency:
    frequency = TokenFrequency(SIZE, GENES)
    frequency.add(*flat(cells))
    return frequency


def test_the_frequency_of_a_gene_is_its_smoothed_share_of_the_training_tokens():
    frequency = fitted([[2, 4], [2], []])
    np.testing.assert_allclose(frequency.frequency_nats([2, 4, 8]), -np.log(np.array([2.5, 1.5, 0.5]) / 5.5))
    assert frequency.cells == 2


def test_the_rank_frequency_leans_on_the_overall_frequency_as_much_as_left_out_tokens_ask_for():
    # two genes a cell: the first is in bin 0, the second in bin 12; gene 2 is first twice, once second
    frequency = fitted([[2, 4], [2, 5], [4, 2]])
    overall = {2: 3.5 / 8.5, 4: 2.5 / 8.5, 5: 1.5 / 8.5, 8: 0.5 / 8.5}
    bins = ([2, 2, 4], [4, 5, 2])

    def likelihood(weight):
        left_out = [(b.count(t) - 1 + weight * overall[t]) / (len(b) - 1 + weight) for b in bins for t in b]
        return np.log(left_out).sum()

    w = max([20, 200, 2_000, 20_000, 200_000, 2_000_000], key=likelihood)
    expected = [(2 + w * overall[2]) / (3 + w), (1 + w * overall[2]) / (3 + w), w * overall[8] / (3 + w), overall[8]]
    nats = frequency.rank_frequency_nats(np.array([2, 2, 8, 8]), np.array([0, 1, 0, 3]), np.array([2, 2, 2, 4]))
    np.testing.assert_allclose(nats, -np.log(expected))


@pytest.mark.parametrize(
    ("shuffle", "share"),
    [(False, 0.9), (True, 0.01)],
    ids=["ranks that say all are trusted", "ranks that say nothing are not"],
)
def test_the_weight_follows_what_ranks_say(shuffle, share):
    draw = np.random.default_rng(0)
    cells = [list(draw.permutation(GENES) if shuffle else GENES) for _ in range(400)]
    ranked = fitted(cells).probabilities()[1]
    overall = 1 / len(GENES)
    excess = (ranked[0].max() - overall) / (1 - overall)
    assert excess > share if not shuffle else excess < share


@given(cells_of_genes)
def test_probabilities_sum_to_one_over_genes_whatever_the_training_cells(cells):
    frequency = fitted(cells)
    assert np.exp(-frequency.frequency_nats(GENES)).sum() == pytest.approx(1)
    for position in range(RANK_BINS):
        nats = frequency.rank_frequency_nats(GENES, np.full(5, position), np.full(5, RANK_BINS))
        assert np.exp(-nats).sum() == pytest.approx(1)


@given(cells_of_genes, st.integers(0, 12), st.randoms())
def test_neither_the_order_of_cells_nor_the_cut_into_calls_matters(cells, cut, random):
    shuffled = random.sample(cells, len(cells))
    in_two = fitted(shuffled[:cut])
    in_two.probabilities()  # a fit in between must not stick
    in_two.add(*flat(shuffled[cut:]))
    for one, other in zip(fitted(cells).probabilities(), in_two.probabilities(), strict=True):
        np.testing.assert_array_equal(one, other)
    assert in_two.cells == fitted(cells).cells


def test_the_bias_starts_at_log_frequency_and_specials_at_the_rarest_gene():
    prior = frequency_log_prior(fitted([[2, 4], [2]]))
    np.testing.assert_allclose(prior[GENES], -fitted([[2, 4], [2]]).frequency_nats(GENES))
    np.testing.assert_allclose(prior[[0, 1, 3, 7]], np.log(0.5 / 5.5))


def test_a_fit_kept_as_npz_is_read_back_without_pickles_and_says_the_same(tmp_path):
    frequency = fitted([[2, 4, 8], [6]])
    np.savez(tmp_path / "frequency.npz", **frequency.to_arrays())
    with np.load(tmp_path / "frequency.npz", allow_pickle=False) as arrays:
        again = TokenFrequency.from_arrays(arrays)
    np.testing.assert_array_equal(again.probabilities()[1], frequency.probabilities()[1])
    assert (again.cells, again.size) == (2, SIZE)
    again.add(np.array([5]), np.array([0, 1]))  # and can be carried on
    assert frequency.token_counts[5] == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rank_counts": None}, "lack rank_counts"),
        ({"rank_counts": np.zeros((3, SIZE), dtype=np.int64)}, "shapes"),
        ({"rank_counts": np.zeros((RANK_BINS, 8), dtype=np.int64)}, "shapes"),
        ({"gene_tokens": np.array([2.5])}, "shapes"),
        ({"gene_tokens": np.array([-2])}, "shapes"),
        ({"cells": np.zeros(2, dtype=np.int64)}, "shapes"),
    ],
    ids=["absent", "too few bins", "too small a vocabulary", "tokens not whole", "tokens negative", "cells not one"],
)
def test_a_broken_file_of_frequencies_is_refused_in_one_line(change, message):
    arrays = {**fitted([[2, 4]]).to_arrays(), **change}
    with pytest.raises(DataError, match=message) as refusal:
        TokenFrequency.from_arrays({name: array for name, array in arrays.items() if array is not None})
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("tokens", "cu_lengths", "message"),
    [
        ([2, 3], [0, 2], "not a gene"),
        ([2, 9], [0, 2], "not a gene"),
        ([2, -1], [0, 2], "not a gene"),
        ([2, 4], [0, 1], "cu_lengths"),
        ([2, 4], [1, 2], "cu_lengths"),
        ([2, 4], [0, 3, 2], "cu_lengths"),
        ([], [], "cu_lengths"),
    ],
    ids=["special", "too large", "negative", "short", "late", "falling", "none"],
)
def test_tokens_that_are_no_genes_and_offsets_that_do_not_fit_are_refused(tokens, cu_lengths, message):
    with pytest.raises(ValueError, match=message):
        TokenFrequency(SIZE, GENES).add(np.array(tokens, dtype=np.int32), np.array(cu_lengths, dtype=np.int64))


def test_a_position_outside_its_cell_is_refused():
    with pytest.raises(ValueError, match="outside its cell"):
        fitted([[2]]).rank_frequency_nats(np.array([2]), np.array([3]), np.array([3]))
