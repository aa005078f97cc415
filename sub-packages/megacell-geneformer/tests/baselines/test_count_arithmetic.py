# SPDX-License-Identifier: Apache-2.0
"""Count arithmetic: the decoder against brute force, the prediction by hand, and the figure on real cells."""

import itertools
import math

import numpy as np
import pytest
import scipy.sparse as sp
from hypothesis import given, settings
from hypothesis import strategies as st

from megacell.core.errors import DataError
from megacell.geneformer.baselines.count_arithmetic import ArithmeticSettings, CountArithmetic
from megacell.geneformer.baselines.count_decoding import MAX_RANDOM_RUN, decode_counts

OFFSET = 4  # specials before the genes
DEFAULTS = ArithmeticSettings()


def rank(genes: np.ndarray, counts: np.ndarray, medians: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A cell's tokens and counts by descending count / median, ties by ascending token."""
    order = np.lexsort((genes, -counts / medians[genes]))
    return genes[order] + OFFSET, counts[order]


def flat(cells: list) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    tokens, counts = (np.concatenate(part) for part in zip(*cells, strict=True))
    return tokens, counts, np.cumsum([0, *(len(cell[0]) for cell in cells)])


def fit(cells: list, medians: np.ndarray, constants: ArithmeticSettings = DEFAULTS) -> CountArithmetic:
    size = len(medians) + OFFSET
    arithmetic = CountArithmetic(size, np.arange(OFFSET, size), constants)
    arithmetic.add(*flat(cells))
    arithmetic.fit(np.concatenate([np.full(OFFSET, np.nan), medians]))
    return arithmetic


def random_cells(n_cells: int, n_genes: int, seed: int = 0) -> tuple[list, np.ndarray]:
    """Ranked cells with geometric counts around gene medians, without ties, and the medians."""
    rng = np.random.default_rng(seed)
    medians = rng.uniform(0.5, 3, n_genes)
    cells = []
    for _ in range(n_cells):
        genes = np.flatnonzero(rng.random(n_genes) < np.linspace(0.9, 0.1, n_genes))
        cells.append(rank(genes, rng.geometric(1 / (1 + medians[genes])).astype(float), medians))
    return cells, medians


def mask(cells: list, n_genes: int, seed: int) -> tuple:
    """shown, true, chosen, masked and offsets by BERT's 15 % and 80/10/10."""
    rng = np.random.default_rng(seed)
    true, _, cu_lengths = flat(cells)
    chosen, action = rng.random(len(true)) < 0.15, rng.random(len(true))
    shown = np.where(chosen & (action > 0.9), rng.integers(0, n_genes, len(true)) + OFFSET, true)
    return shown, true, chosen, chosen & (action < 0.8), cu_lengths


def objective(tokens, counts, place, log_count, random_cost, violation_cost) -> float:
    """What the decoder maximises, as the module's text has it; -inf for more random tokens in a row than it allows."""
    runs = [len(list(run)) for is_random, run in itertools.groupby(counts, lambda count: count == 0) if is_random]
    if max(runs, default=0) > MAX_RANDOM_RUN or not any(counts):
        return -math.inf
    honest = [(token, count - 1) for token, count in zip(tokens, counts, strict=True) if count]
    violations = sum(place[one] >= place[other] for one, other in itertools.pairwise(honest))
    return (
        sum(log_count[pair] for pair in honest)
        - sum(random_cost for count in counts if count == 0)
        - violation_cost * violations
    )


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.integers(0, 4), min_size=1, max_size=6),
    st.integers(1, 3),
    st.integers(0, 2**31),
    st.sampled_from([0.3, 1.0, 3.0, math.inf]),
    st.sampled_from([0.5, 2.0, 8.0]),
)
def test_decoded_counts_are_as_good_as_the_best_of_all_assignments(
    tokens, max_count, seed, random_cost, violation_cost
):
    rng = np.random.default_rng(seed)
    place = -np.sort(-rng.permutation(5 * max_count).reshape(5, max_count).astype(np.int32), axis=1)
    log_count = np.log(rng.dirichlet(np.ones(max_count), 5))
    costs = (place, log_count, random_cost, violation_cost)
    best = max(
        objective(tokens, counts, *costs) for counts in itertools.product(range(max_count + 1), repeat=len(tokens))
    )
    decoded = decode_counts(np.array(tokens), *costs).tolist()
    assert objective(tokens, decoded, *costs) == pytest.approx(best)


def test_a_cell_without_visible_tokens_decodes_to_nothing():
    table = np.zeros((5, 2))
    assert decode_counts(np.empty(0, dtype=np.int64), table.astype(np.int32), table, 6.0, 12.0).size == 0


def test_the_prediction_of_a_masked_gene_follows_the_formula_by_hand():
    # One count a gene, so that nothing is left to decode: values 1/1, 1/2, 1/3, 1/4, 1/5. Between genes 0 and 3, which
    # are visible, fit the unseen 1 and 2; gene 4 lies below. Of 10 cells all show gene 1 and three gene 2.
    medians = np.arange(1.0, 6)
    shows = [[0, 1, 2, 3]] * 3 + [[0, 1, 3, 4]] * 7
    constants = ArithmeticSettings(max_count=1)
    arithmetic = fit([rank(np.array(genes), np.ones(4), medians) for genes in shows], medians, constants)
    true = np.array([0, 2, 3]) + OFFSET
    nats = arithmetic.nats(true, true, np.array([0, 1, 0], bool), np.array([0, 1, 0], bool), np.array([0, 3]))

    gene_1, gene_2 = (d / (1 - 0.88 * d) for d in (10.5 / 11, 3.5 / 11))
    frequency = np.array([10.5, 10.5, 3.5, 10.5, 7.5]) / 42.5
    in_bin = 20 * frequency / 20  # position 1 of 3 is bin 8, where no token of a cell of four genes falls
    fallback = 0.9 * in_bin[2] / in_bin[[1, 2, 4]].sum() + 0.1 * in_bin[2]
    np.testing.assert_allclose(np.exp(-nats), [0.95 * gene_2 / (gene_1 + gene_2) + 0.05 * fallback])


def test_equal_values_are_told_apart_by_ascending_token_as_the_rank_encoding_orders_them():
    medians = np.array([1.0, 2.0, 2.0, 2.0, 4.0])
    cells = [rank(np.arange(5), np.ones(5), medians)] * 20
    arithmetic = fit(cells, medians, ArithmeticSettings(max_count=1, fallback_share=0.0))
    true, position_of_2 = cells[0][0], np.array([0, 0, 1, 0, 0], bool)
    nats = arithmetic.nats(true, true, position_of_2, position_of_2, np.array([0, 5]))
    np.testing.assert_allclose(nats, [0], atol=1e-12)  # 1, 2 and 3 have one value; between 1 and 3 only 2 fits


@pytest.mark.parametrize("random_at", [9, 11], ids=["before", "after"])
def test_a_random_gene_next_to_a_masked_one_is_passed_over_for_the_next_honest_bound(random_at):
    medians = np.arange(1.0, 41)
    train = [rank(np.arange(40), np.ones(40), medians)] * 50
    arithmetic = fit(train, medians, ArithmeticSettings(max_count=3, fallback_share=0.01))
    true = np.setdiff1d(np.arange(40), [2, 4, 6, 30, 32, 34, 36]) + OFFSET  # those fit nowhere near the masked position
    shown = true.copy()
    shown[random_at] = (36 if random_at == 9 else 2) + OFFSET  # far out of order
    at_10 = np.arange(len(true)) == 10
    nats = arithmetic.nats(shown, true, at_10, at_10, np.array([0, len(true)]))
    assert 0.45 < np.exp(-nats[0]) < 0.55  # the gene that the random one stands for fits as well, and none else does


@pytest.mark.parametrize("shows_mask", [True, False], ids=["where <mask> is shown", "where a gene is shown"])
def test_probabilities_sum_to_one_over_genes(shows_mask):
    n_genes = 40
    cells, medians = random_cells(60, n_genes)
    arithmetic = fit(cells[:50], medians)
    for tokens, _ in cells[50:]:
        n, position = len(tokens), len(tokens) // 2
        chosen = np.tile(np.arange(n) == position, n_genes)
        shown, true = np.tile(tokens, n_genes), np.tile(tokens, n_genes)
        true[chosen] = np.arange(n_genes) + OFFSET
        masked = chosen & shows_mask
        nats = arithmetic.nats(shown, true, chosen, masked, np.arange(n_genes + 1) * n)
        assert np.exp(-nats).sum() == pytest.approx(1)
        assert np.isfinite(nats).all()
        assert shows_mask or nats[tokens[position] - OFFSET] <= np.log(2)  # half goes to the gene shown


def test_what_stands_behind_a_mask_is_not_looked_at_and_cells_do_not_mix():
    cells, medians = random_cells(60, 40)
    arithmetic = fit(cells[:40], medians)
    shown, true, chosen, masked, cu_lengths = mask(cells[40:], 40, seed=1)
    nats = arithmetic.nats(shown, true, chosen, masked, cu_lengths)
    np.testing.assert_array_equal(arithmetic.nats(np.where(masked, 0, shown), true, chosen, masked, cu_lengths), nats)
    alone = [
        arithmetic.nats(shown[a:b], true[a:b], chosen[a:b], masked[a:b], np.array([0, 0, b - a, b - a]))
        for a, b in itertools.pairwise(cu_lengths)
    ]
    np.testing.assert_array_equal(np.concatenate(alone), nats)


def test_the_order_of_training_cells_the_unit_of_medians_and_the_numbers_of_genes_do_not_matter():
    cells, medians = random_cells(60, 40)
    masked_cells = mask(cells[40:], 40, seed=1)
    nats = fit(cells[:40], medians).nats(*masked_cells)
    np.testing.assert_allclose(fit(cells[39::-1], medians * 7).nats(*masked_cells), nats)

    number = np.random.default_rng(2).permutation(40)  # gene i becomes gene number[i]; there are no ties to break anew
    renumbered = [(number[tokens - OFFSET] + OFFSET, counts) for tokens, counts in cells[:40]]
    shown, true, *rest = masked_cells
    again = fit(renumbered, medians[np.argsort(number)])
    renamed = (number[shown - OFFSET] + OFFSET, number[true - OFFSET] + OFFSET)
    np.testing.assert_allclose(again.nats(*renamed, *rest), nats)


def test_counts_above_the_largest_bin_share_it():
    cells, _ = random_cells(20, 10)
    first, second = (CountArithmetic(14, np.arange(4, 14)) for _ in range(2))
    tokens, counts, cu_lengths = flat(cells)
    first.add(tokens, counts + 59, cu_lengths)
    second.add(tokens, counts + 5000, cu_lengths)
    np.testing.assert_array_equal(first.count_table, second.count_table)
    assert first.count_table[:, 59].sum() == len(tokens)


@pytest.mark.parametrize("count", [0.5, 0.0, -1.0, 1.25, math.nan, math.inf])
def test_counts_that_are_not_whole_are_refused_saying_so(count):
    arithmetic = CountArithmetic(6, [4, 5])
    with pytest.raises(DataError, match="whole counts"):
        arithmetic.add(np.array([4, 5]), np.array([2.0, count]), np.array([0, 2]))
    assert arithmetic.frequency.cells == 0  # nothing was half added


@pytest.mark.parametrize("median", [0.0, -1.0, math.nan, math.inf])
def test_a_median_that_is_not_positive_is_refused(median):
    with pytest.raises(DataError, match="token 5"):
        CountArithmetic(6, [4, 5]).fit(np.array([math.nan] * 4 + [1.0, median]))


def test_wrong_calls_are_refused():
    token, yes, no, offsets = np.array([4]), np.array([True]), np.array([False]), np.array([0, 1])
    arithmetic = CountArithmetic(6, [4, 5])
    with pytest.raises(ValueError, match="call fit"):
        arithmetic.nats(token, token, yes, yes, offsets)
    with pytest.raises(ValueError, match="shape"):
        arithmetic.fit(np.ones(2))
    with pytest.raises(ValueError, match="counts"):
        arithmetic.add(token, np.ones(2), offsets)
    arithmetic.fit(np.ones(6))
    with pytest.raises(ValueError, match="masked positions chosen"):
        arithmetic.nats(token, token, no, yes, offsets)
    with pytest.raises(ValueError, match="not a gene"):
        arithmetic.nats(np.array([1]), token, yes, no, offsets)
    with pytest.raises(ValueError, match="max_count"):
        CountArithmetic(6, [4, 5], ArithmeticSettings(max_count=128))
    with pytest.raises(ValueError, match="violation_cost"):
        CountArithmetic(6, [4, 5], ArithmeticSettings(violation_cost=math.inf))


@pytest.fixture(scope="module")
def pbmc() -> tuple[list, list, np.ndarray]:
    """The 700 PBMC that scanpy holds as ranked cells: 600 to train on, 100 held out, and medians of the 600.

    The file holds log(1 + count * factor) with one factor a cell. As the least count of each cell is 1, dividing by the
    least value gives counts back up to rounding, which is checked.
    """
    import scanpy

    values = sp.csr_matrix(scanpy.datasets.pbmc68k_reduced().raw.X, dtype=np.float64)
    values.data = np.expm1(values.data)
    least = np.minimum.reduceat(values.data, values.indptr[:-1])
    values.data /= np.repeat(least, np.diff(values.indptr))
    assert np.abs(values.data / np.round(values.data) - 1).max() < 0.002  # less than half of 1 in 250, the largest
    values.data = np.round(values.data)
    order = np.random.default_rng(0).permutation(values.shape[0])
    scaled = sp.diags(1e4 / np.asarray(values.sum(axis=1)).ravel()) @ values
    columns = scaled[order[:600]].tocsc()
    medians = np.array(
        [np.median(column) if column.size else 1.0 for column in np.split(columns.data, columns.indptr[1:-1])]
    )
    cells = [rank(values[i].indices, values[i].data, medians) for i in order]
    return cells[:600], cells[600:], medians


def test_on_real_cells_arithmetic_is_far_below_both_frequencies(pbmc):
    train, held_out, medians = pbmc
    arithmetic = fit(train, medians)
    shown, true, chosen, masked, cu_lengths = mask(held_out, len(medians), seed=1)
    lengths = np.repeat(np.diff(cu_lengths), np.diff(cu_lengths))
    position = np.arange(len(true)) - np.repeat(cu_lengths[:-1], np.diff(cu_lengths))
    frequency = arithmetic.frequency
    assert 6.2 < frequency.frequency_nats(true[chosen]).mean() < 6.6
    assert 5.6 < frequency.rank_frequency_nats(true[chosen], position[chosen], lengths[chosen]).mean() < 6.0
    nats = arithmetic.nats(shown, true, chosen, masked, cu_lengths)
    assert nats.shape == (chosen.sum(),)
    assert 2.5 < nats.mean() < 2.9


def test_knowing_of_random_genes_and_of_hidden_ones_helps_on_real_cells(pbmc):
    train, held_out, medians = pbmc
    plain = ArithmeticSettings(random_cost=math.inf, violation_cost=6.0, hidden_share=1.0, fallback_share=0.1)
    masked_cells = mask(held_out, len(medians), seed=1)
    without = fit(train, medians, plain).nats(*masked_cells).mean()
    assert 2.9 < without < 3.2
    assert fit(train, medians).nats(*masked_cells).mean() < without - 0.2
