# SPDX-License-Identifier: Apache-2.0
"""Views, buffers, blocks, prefetching, copies and overlaps."""

import pickle
import shutil

import numpy as np
import pandas as pd
import pytest

from megacell.core.buffers import RowBuffer
from megacell.core.errors import DataError, UsageError
from megacell.store import CellStore, convert
from megacell.store.read.duplicates import count_pairs
from megacell.store.read.overlap import Overlap, overlap

ALLOWED = {"allow_subset": True}


@pytest.fixture
def store(counts, made, save, tmp_path) -> CellStore:
    obs = pd.DataFrame(
        {"tissue": pd.Categorical(["lung", "liver", None] * 20), "age": np.arange(60), "a b": np.arange(60) % 2},
        index=[f"cell-{i}" for i in range(60)],
    )
    convert(save(made.anndata(counts, obs=obs)), tmp_path / "store", shard_bytes=10_000, **ALLOWED)
    return CellStore.open(tmp_path / "store")


def test_a_view_reads_the_cells_that_a_query_names(store, counts):
    view = store.select("tissue == 'lung' and `a b` == 1")
    expected = np.flatnonzero((np.arange(60) % 3 == 0) & (np.arange(60) % 2 == 1))
    assert view.cells.tolist() == expected.tolist()
    assert view.shape == (len(expected), 300)
    np.testing.assert_array_equal(view.rows(slice(None)).toarray(), counts[expected])
    np.testing.assert_array_equal(view.rows([2, 0, 0]).toarray(), counts[expected[[2, 0, 0]]])
    np.testing.assert_array_equal(view.rows(np.arange(len(view)) > 3).toarray(), counts[expected[4:]])
    assert view.obs["age"].tolist() == view.obs_column("age").tolist() == expected.tolist()
    assert view.select("age > 30").cells.tolist() == expected[expected > 30].tolist()
    assert view.to_anndata([1]).obs_names.tolist() == [f"cell-{expected[1]}"]
    again = pickle.loads(pickle.dumps(view))  # our own bytes
    np.testing.assert_array_equal(again.rows([1]).toarray(), counts[expected[[1]]])
    assert store.select("source == 'made'").shape[0] == 60
    assert len(store.select("tissue != tissue or age > 99")) == 20  # missing is unequal to itself
    assert view.rows([]).shape == (0, 300)


@pytest.mark.parametrize("indices", [[99], [-1], [0.5], np.ones(60, bool)])
def test_cells_that_a_view_lacks_are_an_error(indices, store):
    with pytest.raises(DataError):
        store.select("age < 10").rows(indices)


def test_a_query_reads_no_column_that_it_does_not_name(store, monkeypatch):
    asked = []
    real = CellStore._obs_table
    monkeypatch.setattr(
        CellStore, "_obs_table", lambda self, shard, names: asked.extend(names) or real(self, shard, names)
    )
    store.select("age > 3")
    assert set(asked) == {"_index", "age"}


@pytest.mark.parametrize("query", ["tissu == 'lung'", "age", "tissue", "age >", "@np.ones(60)"])
def test_a_wrong_query_is_wrong_usage(query, store):
    with pytest.raises(UsageError, match="the query"):
        store.select(query)


def test_a_buffer_is_filled_again_and_gives_the_same(store, counts):
    buffer = RowBuffer()
    first = store.rows([3, 4], buffer)
    np.testing.assert_array_equal(first.toarray(), counts[[3, 4]])
    where = store.rows(np.arange(60), buffer).data.ctypes.data
    for cells in ([5], [59, 0, 0], np.arange(60)):
        found = store.rows(cells, buffer)
        np.testing.assert_array_equal(found.toarray(), counts[cells])
        assert len(cells) < 60 or found.data.ctypes.data == where  # SciPy itself copies what is small
    _, genes, values = store.gather([7], RowBuffer())
    assert genes.dtype == np.uint16
    np.testing.assert_array_equal(values, counts[7][counts[7] > 0])


@pytest.mark.parametrize("size", [1, 7, 60, 1000])
def test_blocks_are_all_cells_in_order(size, store, counts):
    blocks = list(store.blocks(size))
    assert [first for first, _ in blocks] == list(range(0, 60, size))
    np.testing.assert_array_equal(np.vstack([block.toarray() for _, block in blocks]), counts)
    view = store.select("age >= 10")
    np.testing.assert_array_equal(np.vstack([block.toarray() for _, block in view.blocks(size)]), counts[10:])


@pytest.mark.parametrize(("start", "stop"), [(0, 60), (13, 44), (5, 6), (30, 30), (60, 60)])
def test_a_range_is_given_as_it_lies_on_disk(start, stop, store, counts):
    found = np.zeros((stop - start, 300), np.float32)
    for first, indptr, genes, values in store.stored(start, stop):
        assert not values.flags.owndata
        assert not values.flags.writeable
        row = first - start + np.repeat(np.arange(len(indptr) - 1), np.diff(indptr))
        found[row, genes] = values
    np.testing.assert_array_equal(found, np.minimum(counts[start:stop], 255))
    with pytest.raises(DataError):
        next(store.stored(0, 61))


def test_prefetching_asks_for_the_pages_of_these_cells(store, counts):
    assert store.prefetch([]) == 0
    assert 0 < store.prefetch([0]) <= store.prefetch(np.arange(60))
    np.testing.assert_array_equal(store.rows(slice(None)).toarray(), counts)


def test_gene_tables_are_compared(store, counts, made, save, tmp_path):
    shutil.copytree(store.path, tmp_path / "copy")
    assert store.same_genes(CellStore.open(tmp_path / "copy"))
    convert(save(made.counts(60, 300, seed=1), "o.h5ad", first_gene=1), tmp_path / "other", **ALLOWED)
    assert not store.same_genes(CellStore.open(tmp_path / "other"))


def test_pairs_of_sources_are_counted_as_one_by_one(made):
    random = np.random.default_rng(0)
    hashes, source_of = random.integers(0, 40, 300).astype(np.uint64), random.integers(0, 5, 300).astype(np.uint32)
    expected = {}
    for a in range(5):
        for b in range(a, 5):
            own = [h for h in range(1, 41) if (source_of[hashes == h] == a).sum() > (a == b)]
            n = sum(a == b or bool((source_of[hashes == h] == b).any()) for h in own)
            if n:
                expected[a, b] = n
    assert count_pairs(hashes, source_of) == expected


def test_copies_are_found_whatever_is_sorted_at_once(store, counts, made, save, tmp_path, monkeypatch):
    from megacell.store.read import duplicates

    path = save(np.vstack([counts[:9], made.counts(30, 300, seed=2)]), "b.h5ad")
    convert(path, store.path, append=True, **ALLOWED)
    whole = CellStore.open(store.path)
    found = duplicates.duplicates_of(whole.path, whole.manifest)
    assert [str(pair) for pair in found] == ["9 cells stand in made and b"]
    monkeypatch.setattr(duplicates, "AT_ONCE", 8)
    assert duplicates.duplicates_of(whole.path, whole.manifest) == found


def test_overlap_says_which_cells_another_store_holds(store, counts, made, save, tmp_path):
    other = made.counts(30, 300, seed=2)
    other[29] = 0
    counts[17] = 0  # a cell without counts is held by none
    files = [save(np.vstack([counts[10:20], other]), "mixed.h5ad"), save(other[:25] + 1, "new.h5ad")]
    convert(files, tmp_path / "test", **ALLOWED)
    assert overlap(CellStore.open(tmp_path / "test"), store) == [Overlap("mixed", 38, 9), Overlap("new", 25, 0)]
