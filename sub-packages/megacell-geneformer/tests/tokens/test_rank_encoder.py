# SPDX-License-Identifier: Apache-2.0
"""Rank value encoding against a slow oracle: every gene a Python float, every cell a Python sort."""

from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import numpy as np
import pytest
import scipy.sparse as sp
from hypothesis import given, settings
from hypothesis import strategies as st

from megacell.core.errors import DataError, UsageError
from megacell.geneformer.tokens.pair_numbers import MOST_OTHERS, NEAR, PLACE_BITS, number_pairs
from megacell.geneformer.tokens.rank_encoder import RankEncoder, RowsOfStore, rank_encode
from megacell.store import CellStore, convert
from megacell.store.read.gather import POSITIONS

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


def in_place(store, cells, encoder):
    return split_up(*encoder.encode_in_place(RowsOfStore(store, store.rows_in_place(cells))))


@pytest.mark.parametrize("edition", ["V1", "V2"])
def test_real_cells_read_in_place_are_those_copied(edition, real_store, published):
    encoder = RankEncoder(real_store.gene_ids, real_store.symbols, published[edition])
    cells = np.random.default_rng(0).permutation(len(real_store))
    assert in_place(real_store, cells, encoder) == split_up(*encoder.encode(*real_store.gather(cells)))


@pytest.fixture(scope="module")
def wide_store(tmp_path_factory):
    """120 cells of 11,000 genes: ties, counts above 254, one gene, none, and rows too long for short keys."""
    import anndata
    import pandas as pd

    rng = np.random.default_rng(3)
    counts = rng.poisson(rng.uniform(0.01, 0.4, (120, 1)), (120, 11_000))
    counts *= rng.choice([1, 1, 1, 2, 3, 40], (120, 11_000))
    counts[:5] = 1
    counts[5:10] = rng.integers(1, 5, (5, 11_000))
    counts[10:15, :7] = [255, 256, 254, 70_000, 2**20, 1, 253]
    counts[15] = 0
    counts[15, 4] = 3
    ids = pd.Index([f"ENSG{g:011d}" for g in range(11_000)], dtype=object)
    path = tmp_path_factory.mktemp("wide")
    anndata.AnnData(sp.csr_matrix(counts, dtype=np.float32), var=pd.DataFrame(index=ids)).write_h5ad(path / "w.h5ad")
    convert([path / "w.h5ad"], path / "store")
    return CellStore.open(path / "store")


@settings(max_examples=25)
@given(
    medians=st.lists(MEDIANS, min_size=11, max_size=11),
    shared=st.booleans(),
    unknown=st.integers(0, 10),
    max_length=st.sampled_from([3, 40, 20_000]),
    cells=st.lists(st.integers(0, 119), min_size=1, max_size=4),
)
def test_any_medians_rank_rows_of_files_as_the_oracle_does(
    medians, shared, unknown, max_length, cells, wide_store, vocabulary_for
):
    n = wide_store.shape[1]
    vocabulary = vocabulary_for(n, medians=np.resize(medians, n), max_length=20_000)
    ids = np.array([f"ENSG{int(i[4:]) % 9000 if shared else int(i[4:]):011d}" for i in wide_store.gene_ids], object)
    ids[unknown::17] = "unheard-of"
    encoder = RankEncoder(ids, None, vocabulary, max_length)
    expected = [oracle(row, encoder.tokens.tolist(), vocabulary, max_length) for row in rows_of(wide_store.rows(cells))]
    assert in_place(wide_store, cells, encoder) == expected


def test_errors_leave_nothing_behind_that_changes_the_next_rows(wide_store, vocabulary_for):
    n = wide_store.shape[1]
    ids = [f"ENSG{g % 6:011d}" for g in range(n)]
    encoder = RankEncoder(ids, None, vocabulary_for(n, max_length=64))
    rows = wide_store.rows_in_place(np.arange(10, 12))
    before = split_up(*encoder.encode_in_place(RowsOfStore(wide_store, rows)))
    table = rows.table.copy()
    nowhere = np.full(1 << 16, -1, np.int64)
    table[:, POSITIONS] = nowhere.ctypes.data  # counts above 254 are not to be found
    with pytest.raises(DataError, match="damaged; run `megacell verify"):
        encoder.encode_in_place(RowsOfStore(wide_store, rows._replace(table=table)))
    assert split_up(*encoder.encode_in_place(RowsOfStore(wide_store, rows))) == before


def test_a_gene_that_does_not_exist_is_an_error_and_no_token(wide_store, vocabulary_for):
    encoder = RankEncoder([f"ENSG{g:011d}" for g in range(50)], None, vocabulary_for(50))
    with pytest.raises(DataError, match="damaged"):
        encoder.encode_in_place(RowsOfStore(wide_store, wide_store.rows_in_place([3])))


@given(
    medians=st.lists(MEDIANS | st.floats(1e-3, 1e3), min_size=1, max_size=40),
    totals=st.lists(st.integers(1, 10**7), min_size=1, max_size=3),
)
def test_numbers_order_values_strictly_whatever_the_total(medians, totals):
    """And pairs that share a number are near."""
    tokens, medians = np.arange(len(medians), dtype=np.int32), np.array(medians)
    pairs = number_pairs(tokens, medians, np.zeros(len(medians), bool))
    first = pairs.by_gene[: len(medians)] >> 8
    most = (pairs.by_gene[: len(medians)] & 255) - 1
    gene, count = np.nonzero(np.arange(254) < most[:, None])
    number = pairs.keys[first[gene] + count + 1] >> PLACE_BITS
    ratio = (count + 1) / medians[gene]
    order = np.lexsort((-ratio, number))
    gene, count, number, ratio = gene[order], count[order] + 1, number[order], ratio[order]
    same = number[1:] == number[:-1]
    assert (np.abs(ratio[1:] - ratio[:-1])[same] <= NEAR * ratio[1:][same]).all()
    for total in totals:
        value = count / float(total) * 10_000 / medians[gene]
        falls = value[:-1] > value[1:]
        tie = (value[:-1] == value[1:]) & (tokens[gene[:-1]] < tokens[gene[1:]])
        assert (falls | tie)[~same].all()


def test_more_pairs_without_a_number_than_are_worth_it_go_by_values(vocabulary_for):
    genes = 4 * MOST_OTHERS
    counts = sp.csr_matrix(np.arange(1, genes + 1)[None] * 1000 + 0.0)
    vocabulary = vocabulary_for(genes, max_length=genes + 2)
    encoder = RankEncoder(vocabulary.gene_ids, None, vocabulary)
    tokens, cu = encoder.encode(counts.indptr.astype(np.int64), counts.indices.astype(np.uint32), counts.data)
    found = [tokens[a:b].tolist() for a, b in pairwise(cu)]
    assert found == [oracle(row, encoder.tokens.tolist(), vocabulary) for row in rows_of(counts)]


def test_a_call_never_uses_the_encoder_of_other_genes_lengths_or_vocabulary(vocabulary_for):
    first, second = vocabulary_for(5), vocabulary_for(5, medians=[3, 1, 2, 9, 0.1])
    ids = np.array([f"ENSG{g:011d}" for g in range(5)], object)
    counts = sp.csr_matrix(np.arange(10, dtype=np.float32).reshape(2, 5))
    calls = [
        (ids, first, None),
        (ids[::-1].copy(), first, None),
        (ids, second, None),
        (ids, first, 4),
        (ids, first, None),
    ]
    for gene_ids, vocabulary, length in calls + calls[::-1]:
        encoder = RankEncoder(gene_ids, None, vocabulary, length)
        expected = encoder.encode(counts.indptr.astype(np.int64), counts.indices.astype(np.uint32), counts.data)
        for one, other in zip(rank_encode(counts, gene_ids, vocabulary, length), expected, strict=True):
            np.testing.assert_array_equal(one, other)
    ids[0] = "ENSG99999999999"  # the caller's own array changes in place
    tokens, _ = rank_encode(counts, ids, first)
    assert first.tokens_of(["ENSG00000000000"], None)[0] not in tokens
