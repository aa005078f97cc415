# SPDX-License-Identifier: Apache-2.0
"""Medians against numpy's, whatever fits in memory; and vocabularies built from a store."""

import numpy as np
import pytest
import scipy.sparse as sp
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from megacell.core.errors import DataError
from megacell.geneformer.vocabulary.build import build_vocabulary
from megacell.geneformer.vocabulary.medians import CellsOf, gene_medians, medians_over
from megacell.store.sampling.split import SplitSettings, split_cells


def medians_by_numpy(counts, cells=slice(None), least=1):
    counts = np.asarray(counts, float)
    total = counts.sum(1, keepdims=True)
    values = (counts / np.where(total > 0, total, 1) * 10_000)[cells]
    columns = [column[column > 0] for column in values.T]
    return np.array([np.median(c) if len(c) >= least else np.nan for c in columns]), [len(c) for c in columns]


@given(
    counts=arrays(
        np.int64, st.tuples(st.integers(1, 40), st.just(5)), elements=st.sampled_from([0, 0, 1, 1, 2, 3, 700])
    ),
    most_values=st.sampled_from([0, 1, 5, 1000]),
    least=st.integers(1, 4),
)
def test_medians_are_numpys_whether_or_not_they_fit_in_memory(counts, most_values, least, made_up):
    medians, seen = gene_medians(made_up(counts), np.arange(len(counts)), least, most_values)
    expected, number = medians_by_numpy(counts, least=least)
    assert np.array_equal(medians, expected, equal_nan=True)
    assert seen.tolist() == number


@pytest.mark.parametrize("most_values", [2**25, 100_000, 0], ids=["all at once", "in bins first", "to the last bit"])
def test_medians_of_real_cells(most_values, real_cells, made_up):
    counts, ids = real_cells["pbmc4k_a"]
    cells = np.arange(0, counts.shape[0], 2)
    medians, _ = gene_medians(made_up(counts, ids), cells, 10, most_values)
    expected, _ = medians_by_numpy(counts.toarray(), cells, least=10)
    assert np.array_equal(medians, expected, equal_nan=True)
    assert np.isfinite(medians).sum() > 8000


@pytest.fixture
def store(made_up):
    """A store of 400 cells from 20 donors in two sources, one of them a subset of genes."""
    rng = np.random.default_rng(1)
    counts = rng.poisson(1.0, (400, 30))
    counts[200:, 20:] = 0
    counts[:, 29] = 0
    counts[:9, 29] = 1
    ids = [f"ENSG{99 - g:011d}" for g in range(28)] + ["SYMBOL1", "ENSG00000000001"]
    donors = [f"d{i % 20}" for i in range(400)]
    sources = ["full.h5ad"] * 200 + ["chosen.h5ad"] * 200
    return made_up(counts, ids, donors=donors, sources=sources, subsets=["chosen.h5ad"])


def test_a_built_vocabulary_holds_training_cells_of_full_sources_only(store):
    vocabulary, lines = build_vocabulary(store, SplitSettings(seed=3))
    split = split_cells(store, SplitSettings(seed=3))
    cells = np.flatnonzero(split.train & (store.source_of == 0))
    expected, _ = medians_by_numpy(store.matrix.toarray(), cells)
    by_id = dict(zip(store.gene_ids, expected, strict=True))
    assert vocabulary.medians.tolist() == [by_id[gene] for gene in vocabulary.gene_ids]
    assert "ENSG00000000001" not in vocabulary.gene_ids  # in nine cells
    assert lines[0] == split.line
    assert "left out: 200 cells of gene subsets (chosen.h5ad)" in lines
    assert any("1 of them have a symbol for an id" in line for line in lines)
    assert vocabulary.split == {"by": "auto", "holdout": 0.1, "seed": 3}
    assert vocabulary.provenance["training_cells"] == len(cells)
    assert vocabulary.provenance["store"]["digest"] == store.digest


def test_its_tokens_follow_the_specials_by_ascending_id(store):
    vocabulary, _ = build_vocabulary(store)
    assert vocabulary.specials == {"pad": 0, "mask": 1, "cls": 2, "eos": 3}
    assert (vocabulary.prefix, vocabulary.suffix, vocabulary.max_length) == ((2,), (3,), 2048)
    assert vocabulary.gene_ids.tolist() == sorted(vocabulary.gene_ids)
    assert vocabulary.tokens.tolist() == list(range(4, 4 + len(vocabulary.gene_ids)))


def test_subsets_count_where_they_are_allowed(store):
    allowed, lines = build_vocabulary(store, allow_subset=True)
    train = np.flatnonzero(split_cells(store, SplitSettings()).train)
    expected, _ = medians_by_numpy(store.matrix.toarray(), train)
    by_id = dict(zip(store.gene_ids, expected, strict=True))
    assert allowed.medians.tolist() == [by_id[gene] for gene in allowed.gene_ids]
    assert "taken: 200 cells of gene subsets (chosen.h5ad)" in lines


def test_only_ranked_biotypes_count_where_biotypes_are_known(made_up):
    biotypes = ["protein_coding", "miRNA", "lncRNA", ""]
    store = made_up(np.ones((50, 4)) + np.arange(50)[:, None], biotypes=biotypes)
    vocabulary, _ = build_vocabulary(store)
    assert vocabulary.gene_ids.tolist() == [store.gene_ids[g] for g in (0, 1, 3)]


def test_a_store_of_subsets_only_is_refused_with_the_mend(made_up):
    store = made_up(np.ones((50, 3)) * np.arange(1, 51)[:, None], subsets=["a.h5ad"])
    with pytest.raises(DataError, match="--allow-subset"):
        build_vocabulary(store)


def test_too_few_cells_are_refused_with_the_mend(made_up):
    with pytest.raises(DataError, match="lower --min-cells"):
        build_vocabulary(made_up(np.ones((5, 3))))


def test_the_same_store_gives_the_same_hash(store):
    assert build_vocabulary(store)[0].hash == build_vocabulary(store)[0].hash


def test_cells_without_counts_are_no_trouble(made_up):
    medians, seen = gene_medians(made_up(sp.csr_matrix((3, 2))), np.arange(3))
    assert np.isnan(medians).all()
    assert seen.tolist() == [0, 0]


def test_a_sample_that_misleads_costs_time_and_not_the_median(made_up):
    """Every eighth cell is of another kind, and it is those that the sample is taken from."""
    rng = np.random.default_rng(0)
    counts = rng.poisson(4.0, (16_000, 6)) + 1
    counts[::8] *= np.array([1, 50, 1, 1, 1, 1])
    medians, seen = gene_medians(made_up(counts), np.arange(len(counts)))
    assert np.array_equal(medians, medians_by_numpy(counts)[0])
    assert (seen == len(counts)).all()


@given(
    counts=arrays(
        np.int64, st.tuples(st.integers(1, 80), st.just(5)), elements=st.sampled_from([0, 0, 1, 1, 2, 3, 700])
    ),
    most_values=st.sampled_from([0, 3, 1000]),
    workers=st.integers(1, 3),
    cut=st.integers(0, 80),
)
def test_medians_over_several_stores_and_threads_are_those_of_all_cells(counts, most_values, workers, cut, made_up):
    """The second store has the same genes in another order."""
    order = np.array([3, 0, 4, 1, 2])
    first, second = made_up(counts[:cut]), made_up(counts[cut:, order])
    parts = [CellsOf(first, np.arange(len(first))), CellsOf(second, np.arange(len(second)), order)]
    medians, seen = medians_over(parts, 5, 1, most_values, workers)
    expected, number = medians_by_numpy(counts)
    assert np.array_equal(medians, expected, equal_nan=True)
    assert seen.tolist() == number


def test_a_vocabulary_of_several_stores_is_that_of_all_their_cells(made_up):
    rng = np.random.default_rng(4)
    counts = rng.poisson(1.0, (300, 12))
    ids = np.array([f"ENSG{g:011d}" for g in range(12)])
    one = made_up(counts[:100, :9], ids[:9], symbols=["A", *[""] * 8])
    other = made_up(counts[100:, ::-1], ids[::-1], symbols=[f"S{g}" for g in range(12)][::-1])
    vocabulary, lines = build_vocabulary([one, other], SplitSettings(by="cell", holdout=0), workers=2)
    cells = [(counts[:100, :9], ids[:9]), (counts[100:], ids)]
    values = {gene: [] for gene in ids}
    for matrix, own in cells:
        normalised = matrix / np.maximum(matrix.sum(1, keepdims=True), 1) * 10_000
        for column, gene in zip(normalised.T, own, strict=True):
            values[gene] += column[column > 0].tolist()
    assert vocabulary.gene_ids.tolist() == ids.tolist()
    assert vocabulary.medians.tolist() == [np.median(values[gene]) for gene in ids]
    assert vocabulary.symbols.tolist() == ["A", *[f"S{g}" for g in range(1, 12)]]
    assert [made["cells"] for made in vocabulary.provenance["stores"]] == [100, 200]
    assert "12 genes of 12: those in at least 10 of 300 training cells" in lines


def test_length_normalised_cells_are_left_out_of_medians_even_where_subsets_are_allowed(made_up):
    counts = np.random.default_rng(5).poisson(1.0, (200, 8))
    sources = ["counts.h5ad"] * 120 + ["tpm.h5ad"] * 80
    store = made_up(counts, sources=sources, subsets=["tpm.h5ad"], normalised=["tpm.h5ad"])
    vocabulary, lines = build_vocabulary(store, SplitSettings(by="cell", holdout=0), allow_subset=True)
    expected, _ = medians_by_numpy(counts[:120])
    assert vocabulary.medians.tolist() == expected.tolist()
    assert "left out: 80 cells of length-normalised values (tpm.h5ad)" in lines
