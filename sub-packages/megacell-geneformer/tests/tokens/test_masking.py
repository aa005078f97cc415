# SPDX-License-Identifier: Apache-2.0
"""Masking against a slow oracle of its own definition, and exact binomial bounds."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from reference_philox import reference_philox
from scipy.stats import binom, chisquare

from megacell.core.errors import UsageError
from megacell.core.rng import ORDER, TRAINING, VALIDATION, stream_key
from megacell.geneformer.tokens.masking import MaskSettings, mask_cells

SPECIALS, GENES = (0, 1, 2, 3), np.arange(5, 205, 2, dtype=np.int32)  # gaps: a token is not a gene because of its size


def corrupt(cells, lengths, seed=0, epoch=0, stream=TRAINING, settings=None, rows=None):
    """Mask cells of gene tokens between a cls and an eos; return tokens, truth, masked, labels and cu_lengths."""
    if rows is None:
        rows = [np.random.default_rng(int(c) % 2**31).choice(GENES, n) for c, n in zip(cells, lengths, strict=True)]
        rows = [np.concatenate([[2], row, [3]]) for row in rows]
    truth = np.concatenate(rows).astype(np.int64)
    cu = np.concatenate([[0], np.cumsum([len(row) for row in rows])]).astype(np.int64)
    tokens = truth.copy()
    is_gene = np.zeros(206, bool)
    is_gene[GENES] = True
    masked, labels = np.empty(len(truth), np.int64), np.empty(len(truth), np.int64)
    who = np.asarray(cells, np.int64), np.tile(stream_key(seed, epoch, stream), (len(rows), 1))
    rules = (settings or MaskSettings()).thresholds(), GENES, is_gene, 1
    n = mask_cells((tokens, cu), who, rules, masked, labels)
    return tokens, truth, masked[:n], labels[:n], cu


@given(
    cell=st.integers(0, 2**62), length=st.integers(1, 40), seed=st.integers(0, 2**64 - 1), epoch=st.integers(0, 2**40)
)
def test_masks_are_those_of_the_definition(cell, length, seed, epoch):
    settings = MaskSettings(rate=0.5, mask=0.5, random=0.3)
    tokens, truth, masked, labels, _ = corrupt([cell], [length], seed, epoch, VALIDATION, settings)
    key = reference_philox((epoch & 0xFFFFFFFF, epoch >> 32, VALIDATION, 0), (seed & 0xFFFFFFFF, seed >> 32))[:2]
    low, high = cell & 0xFFFFFFFF, cell >> 32
    expected, chosen = truth.tolist(), []
    for p in range(length + 2):
        if reference_philox((low, high, p // 4, 0), key)[p % 4] < 2**31 and truth[p] > 3:
            chosen.append(p)
            kind, w1, w0, _ = reference_philox((low, high, p, 1), key)
            if kind < 2**31:
                expected[p] = 1
            elif kind < round(0.8 * 2**32):
                expected[p] = int(GENES[((w1 << 32) | w0) * len(GENES) >> 64])
    assert tokens.tolist() == expected
    assert masked.tolist() == chosen
    assert labels.tolist() == truth[masked].tolist()


def test_shares_lie_within_exact_binomial_bounds():
    tokens, truth, masked, labels, _ = corrupt(range(2000), [200] * 2000, settings=MaskSettings())

    def lies_within(found, n, share):
        low, high = binom.interval(1 - 1e-9, n, share)
        return low <= found <= high

    now = tokens[masked]
    assert lies_within(len(masked), 2000 * 200, 0.15)
    assert lies_within((now == 1).sum(), len(masked), 0.8)
    unmasked = now != 1
    changed = unmasked & (now != labels)
    assert lies_within(changed.sum(), len(masked), 0.1 * (1 - 1 / len(GENES)))  # a random gene may be the same one
    untouched = np.delete(np.arange(len(truth)), masked)
    assert np.array_equal(tokens[untouched], truth[untouched])


def test_random_genes_are_uniform_over_genes_and_never_special():
    tokens, _, masked, _, _ = corrupt(range(3000), [200] * 3000, settings=MaskSettings(0.5, 0.0, 1.0))
    drawn = np.bincount(tokens[masked], minlength=206)
    assert drawn[GENES].sum() == len(masked)
    assert chisquare(drawn[GENES]).pvalue > 1e-6


def test_specials_are_never_chosen_even_at_a_rate_of_one():
    tokens, truth, masked, _, cu = corrupt(range(50), range(1, 51), settings=MaskSettings(1.0, 1.0, 0.0))
    assert set(truth[masked]) <= set(GENES.tolist())
    assert len(masked) == len(truth) - 100
    assert (tokens[cu[:-1]] == 2).all()
    assert (tokens[cu[1:] - 1] == 3).all()


def test_a_rate_of_zero_chooses_none():
    assert len(corrupt(range(50), [100] * 50, settings=MaskSettings(rate=0.0))[2]) == 0


def test_a_dynamic_rate_is_uniform_over_cells_and_every_cells_own():
    settings = MaskSettings(rate=0.1, rate_to=0.5)
    _, _, masked, _, cu = corrupt(range(1500), [400] * 1500, settings=settings)
    rates = np.bincount(np.searchsorted(cu, masked, side="right") - 1, minlength=1500) / 400
    assert abs(rates.mean() - 0.3) < 5 * 0.4 / np.sqrt(12 * 1500)
    assert chisquare(np.histogram(np.clip(rates, 0.1, 0.4999), bins=8, range=(0.1, 0.5))[0]).pvalue > 1e-6
    alone = corrupt([77], [400], settings=settings)[2]
    assert np.array_equal(masked[(masked >= cu[77]) & (masked < cu[78])] - cu[77], alone)


def test_the_shares_of_bionemo_lie_within_binomial_bounds():
    tokens, _, masked, labels, _ = corrupt(range(2000), [200] * 2000, settings=MaskSettings(0.15, 0.8, 0.02))
    now = tokens[masked]
    for found, share in (((now == 1).sum(), 0.8), (((now != 1) & (now != labels)).sum(), 0.02 * (1 - 1 / len(GENES)))):
        low, high = binom.interval(1 - 1e-9, len(masked), share)
        assert low <= found <= high


def test_a_cell_looks_the_same_in_any_company():
    cells, lengths = [7, 2**40, 12, 99], [30, 200, 3, 57]
    together, _, _, _, cu = corrupt(cells, lengths)
    for order in ([3, 1, 0, 2], [1], [2, 1]):
        apart, _, _, _, cu2 = corrupt([cells[i] for i in order], [lengths[i] for i in order])
        for place, i in enumerate(order):
            assert np.array_equal(apart[cu2[place] : cu2[place + 1]], together[cu[i] : cu[i + 1]])


@pytest.mark.parametrize(
    "other",
    [{"seed": 1}, {"seed": 2**32}, {"epoch": 1}, {"epoch": 2**32}, {"stream": VALIDATION}, {"stream": ORDER}],
    ids=lambda change: f"another {next(iter(change))}",
)
def test_seed_epoch_and_stream_each_change_the_masks(other):
    chosen = set(corrupt([5], [1000])[2])
    others = set(corrupt([5], [1000], **other)[2])
    assert len(chosen & others) < 60  # 22 of 150 are expected by chance


def test_two_cells_are_masked_independently():
    row = np.concatenate([[2], np.resize(GENES, 1000), [3]])
    _, _, masked, _, cu = corrupt([1, 2, 1 + 2**32], None, rows=[row, row, row])
    sets = [set(masked[(masked >= a) & (masked < b)] - a) for a, b in pairwise(cu)]
    assert all(len(one & other) < 60 for one, other in [(sets[0], sets[1]), (sets[0], sets[2]), (sets[1], sets[2])])


@pytest.mark.parametrize(
    "wrong", [{"rate": 1.1}, {"mask": -0.1}, {"mask": 0.8, "random": 0.3}, {"rate_to": 0.1}], ids=str
)
def test_shares_that_are_none_are_refused(wrong):
    with pytest.raises(UsageError, match="masking"):
        MaskSettings(**wrong)
