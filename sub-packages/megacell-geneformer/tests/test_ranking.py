# SPDX-License-Identifier: Apache-2.0
"""Rank value encoding against a slow oracle: every gene a Python float, every cell a Python sort."""

from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import numpy as np
import pytest
import scipy.sparse as sp
from hypothesis import given
from hypothesis import strategies as st

from megacell.geneformer.ranking import RankEncoder, rank_encode
from megacell.store.errors import DataError, UsageError

# A peer that normalises in float32 gives another order in a few cells of a thousand (values that differ become ties,
# and ties come apart): such an order is no oracle here.


def oracle(row, tokens, vocabulary, max_length=None, number=float):
    """Rank one cell as Geneformer's paper describes it; ``row``: column → count."""
    median_of = dict(zip(vocabulary.tokens.tolist(), vocabulary.medians.tolist(), strict=True))
    total, summed = sum(row.values()), {}
    for column, count in row.items():
        if tokens[column] >= 0 and count > 0:
            summed[tokens[column]] = summed.get(tokens[column], 0) + count
    values = {
        t: number(number(number(c) / number(total)) * number(10_000)) / number(median_of[t]) for t, c in summed.items()
    }
    ranked = sorted(values, key=lambda token: (-values[token], token))
    room = (max_length or vocabulary.max_length) - len(vocabulary.prefix) - len(vocabulary.suffix)
    return [*vocabulary.prefix, *ranked[:room], *vocabulary.suffix] if ranked else []


def rows_of(csr):
    for first, last in pairwise(csr.indptr):
        yield dict(zip(csr.indices[first:last].tolist(), csr.data[first:last].tolist(), strict=True))


def split_up(tokens, cu_lengths):
    return [tokens[a:b].tolist() for a, b in pairwise(cu_lengths)]


def encoded(csr, ids, vocabulary, max_length=None):
    return split_up(*rank_encode(csr, ids, vocabulary, max_length))


@pytest.mark.parametrize("edition", ["V1", "V2"])
@pytest.mark.parametrize("name", ["pbmc4k_a", "pbmc4k_b", "pbmc5k_protein"])
def test_every_real_cell_is_ranked_as_the_oracle_ranks_it(name, edition, real_cells, published):
    counts, ids = real_cells[name]
    vocabulary = published[edition]
    tokens = vocabulary.tokens_of(ids).tolist()
    assert np.mean(np.array(tokens) >= 0) > 0.5
    expected = [oracle(row, tokens, vocabulary) for row in rows_of(counts)]
    assert encoded(counts, ids, vocabulary) == expected


def test_float32_would_reorder_real_cells(real_cells, published):
    """Why values are float64: the oracle tells the two apart."""
    counts, ids = real_cells["pbmc4k_a"]
    tokens = published["V1"].tokens_of(ids).tolist()
    rows = list(rows_of(counts[:200]))
    differ = [oracle(r, tokens, published["V1"]) != oracle(r, tokens, published["V1"], number=np.float32) for r in rows]
    assert any(differ)


GENES = 30
COUNTS = st.sampled_from([0, 0, 0, 1, 1, 1, 2, 3, 4, 6, 254, 255, 256, 70_000, 2**24, 2**31])
FRACTIONS = COUNTS.map(lambda n: n + 0.125)  # eighths: their sum is exact in any order
ULP = 2.0**-52
NEAR_ONE = [1.0, 1.0, 1 + ULP, 1 + 2 * ULP, 1 - ULP / 2, 2.0, 2 + 2 * ULP, 3.0, 3 - 2 * ULP]  # values a last bit apart
MEDIANS = st.sampled_from([*NEAR_ONE, 0.5, 1 / 3, 0.1, 0.2, 0.3, 0.6, 7e-7, 634.3])


@given(
    rows=st.lists(st.lists(COUNTS | FRACTIONS, min_size=GENES, max_size=GENES), min_size=1, max_size=4),
    medians=st.lists(MEDIANS, min_size=GENES, max_size=GENES),
    known=st.lists(st.integers(0, GENES - 1), min_size=GENES, max_size=GENES),
    max_length=st.integers(3, 40),
)
def test_any_counts_with_ties_huge_ones_shared_genes_and_long_cells(rows, medians, known, max_length, vocabulary_for):
    vocabulary = vocabulary_for(GENES, medians=medians)
    ids = [f"ENSG{g:011d}" if g % 5 else "unheard-of" for g in known]  # a repeated id: several columns on one token
    csr = sp.csr_matrix(np.array(rows, np.float32))
    tokens = vocabulary.tokens_of(ids).tolist()
    expected = [oracle(row, tokens, vocabulary, max_length) for row in rows_of(csr)]
    assert encoded(csr, ids, vocabulary, max_length) == expected


@pytest.mark.parametrize("step", [1, -1], ids=["values fall with the token", "values rise with the token"])
def test_values_that_differ_in_their_last_bits_only_are_told_apart(step, vocabulary_for):
    genes = 500
    medians = 1 + np.arange(genes)[::step] * np.finfo(float).eps
    vocabulary = vocabulary_for(genes, medians=medians, max_length=2048)
    csr = sp.csr_matrix(np.ones((2, genes), np.float32))
    expected = [oracle(row, vocabulary.tokens.tolist(), vocabulary) for row in rows_of(csr)]
    assert encoded(csr, vocabulary.gene_ids, vocabulary) == expected
    assert expected[0][1] == vocabulary.tokens[0 if step == 1 else -1]  # so it is the values that decide


def test_equal_values_stand_by_ascending_token(vocabulary_for):
    vocabulary = vocabulary_for(6, medians=[2, 1, 2, 1, 4, 1], tokens=np.array([9, 8, 7, 6, 5, 4], np.int32))
    csr = sp.csr_matrix(np.array([[2, 1, 2, 1, 4, 1]], np.float32))
    assert encoded(csr, vocabulary.gene_ids, vocabulary) == [[2, 4, 5, 6, 7, 8, 9, 3]]


def test_a_cell_without_a_known_gene_has_no_token_not_even_a_special(vocabulary_for):
    csr = sp.csr_matrix(np.array([[0, 5], [3, 0], [0, 0]], np.float32))
    tokens, cu_lengths = rank_encode(csr, ["unheard-of", "ENSG00000000001"], vocabulary_for())
    assert split_up(tokens, cu_lengths) == [[2, 5, 3], [], []]
    assert tokens.dtype == np.int32
    assert cu_lengths.dtype == np.int64


def test_genes_with_one_token_are_summed_before_ranking(published, real_cells):
    counts, ids = real_cells["pbmc4k_a"]
    counts = counts[:50].tocsc()
    twice = sp.hstack([counts, counts[:, ::7] * 3]).tocsr()
    summed = counts.tolil()
    summed[:, ::7] *= 4
    ids_twice = [*ids, *(f"{i}.12" for i in ids[::7])]  # the same genes under versioned ids
    assert encoded(twice, ids_twice, published["V2"]) == encoded(summed.tocsr(), ids, published["V2"])


def test_counts_of_unknown_genes_belong_to_the_total(vocabulary_for):
    """They can change no order, but medians were taken of values with them inside."""
    csr = sp.csr_matrix(np.array([[3, 1, 0], [3, 1, 10**6]], np.float32))
    first, second = encoded(csr, ["ENSG00000000001", "ENSG00000000002", "unheard-of"], vocabulary_for())
    assert first == second


def test_neither_batch_nor_thread_nor_dtype_nor_order_of_columns_matters(real_cells, published):
    counts, ids = real_cells["pbmc4k_b"]
    encoder = RankEncoder(ids, None, published["V2"])

    def encode(block, dtype=np.uint32):
        return split_up(*encoder.encode(block.indptr.astype(np.int64), block.indices.astype(dtype), block.data))

    whole = encode(counts)
    blocks = [counts[i : i + 7] for i in range(0, len(whole), 7)]
    with ThreadPoolExecutor(4) as pool:
        assert [cell for part in pool.map(encode, blocks) for cell in part] == whole
    assert encode(counts[:100], np.uint16) == whole[:100]
    shuffled = np.random.default_rng(0).permutation(len(ids))
    assert encoded(counts[:, shuffled].astype(np.int64), ids[shuffled], published["V2"]) == whole


def test_duplicate_entries_of_a_matrix_are_added_up(vocabulary_for):
    vocabulary = vocabulary_for(3, medians=[1, 1, 1])
    csr = sp.csr_matrix((np.array([1.0, 2.0, 2.5]), np.array([2, 2, 0]), np.array([0, 3])), shape=(1, 3))
    assert encoded(csr, vocabulary.gene_ids, vocabulary) == [[2, 6, 4, 3]]
    assert csr.nnz == 3  # the caller's matrix stays as it was


@pytest.mark.parametrize("wrong", [-1.0, np.nan, np.inf])
def test_what_cannot_be_a_count_is_refused(wrong, vocabulary_for):
    with pytest.raises(DataError, match="raw counts"):
        rank_encode(sp.csr_matrix(np.array([[1.0, wrong]])), ["a", "b"], vocabulary_for())


def test_another_number_of_ids_than_columns_is_refused(vocabulary_for):
    with pytest.raises(DataError, match="2 columns but 1 gene ids"):
        rank_encode(sp.csr_matrix(np.ones((1, 2))), ["a"], vocabulary_for())


def test_a_length_without_room_for_a_gene_is_refused(vocabulary_for):
    with pytest.raises(UsageError, match="max_length 2"):
        RankEncoder(["a"], None, vocabulary_for(), max_length=2)
