# SPDX-License-Identifier: Apache-2.0
"""Histograms of values against NumPy's counts and exact medians; their file, whole or refused."""

import json
import os
import signal
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import scipy.sparse as sp
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from megacell.core.errors import DataError
from megacell.geneformer.vocabulary import histogram_file
from megacell.geneformer.vocabulary.build import TrainingCells, build_exactly
from megacell.geneformer.vocabulary.histogram_file import NAME, Counted
from megacell.geneformer.vocabulary.histograms import MEDIAN_ERROR, Histograms
from megacell.geneformer.vocabulary.medians import gene_medians
from megacell.geneformer.vocabulary.vocabulary import FILES, Vocabulary
from megacell.store.sampling.split import SplitSettings

ROUNDING = 1 + 2.0**-50


def same(one, other):
    """True if two histograms are equal to the last count."""
    names = ("ids", "symbols", "biotypes")
    arrays_of = [[*(getattr(h.genes, n) for n in names), h.bounds, h.buckets, h.cells] for h in (one, other)]
    return all(np.array_equal(a, b) for a, b in zip(*arrays_of, strict=True))


def within_the_bound(medians, exact):
    assert np.array_equal(np.isnan(medians), np.isnan(exact))
    there = ~np.isnan(exact)
    return bool((np.abs(medians - exact)[there] <= MEDIAN_ERROR * ROUNDING * exact[there]).all())


def every_cell(store, workers=1):
    return Histograms.count(store, np.arange(len(store)), workers)


def test_the_bound_that_is_stated_is_a_fifth_of_a_percent():
    assert MEDIAN_ERROR <= 0.002


@given(data=st.data())
def test_medians_of_any_parts_are_within_the_bound_of_those_of_all_cells(data, made_up):
    counts = data.draw(
        arrays(
            np.float32,
            st.tuples(st.integers(1, 40), st.just(5)),
            elements=st.sampled_from([0, 0, 1, 1, 2, 3, 700, 0.25, 1.7, 3e7, 1e-20]),
        )
    )
    part_of = np.array(data.draw(st.lists(st.integers(0, 2), min_size=len(counts), max_size=len(counts))))
    least = data.draw(st.integers(1, 4))
    ids = np.array([f"ENSG{g:011d}" for g in range(5)])
    parts = []
    for number in range(3):
        order = np.array(data.draw(st.permutations(range(5))))
        parts.append(every_cell(made_up(counts[part_of == number][:, order], ids[order])))
    exact, _ = gene_medians(made_up(counts, ids), np.arange(len(counts)), least)
    whole = Histograms.sum(parts)
    assert within_the_bound(whole.medians(least), exact)
    for again in (parts[::-1], [Histograms.sum(parts[1:]), parts[0]], [parts[1], Histograms.sum(parts[::2])]):
        assert same(Histograms.sum(again), whole)
    assert same(every_cell(made_up(counts, ids)), whole)


def test_real_cells_are_counted_as_numpy_counts_them(real_cells, made_up):
    counts, ids = real_cells["pbmc4k_a"]
    ids = ids[::-1]  # so that ids descend by number
    histograms = every_cell(made_up(counts, ids))
    matrix = sp.csr_matrix(counts, dtype=np.float64).tocoo()
    totals = np.bincount(matrix.row, matrix.data, counts.shape[0])
    buckets = (matrix.data / totals[matrix.row] * 10_000).view(np.uint64) >> np.uint64(44)
    rank = np.argsort(np.argsort(ids.astype(str)))
    keys, cells = np.unique(rank[matrix.col] << 32 | buckets.astype(np.int64), return_counts=True)
    assert histograms.genes.ids.tolist() == sorted(ids)
    assert np.array_equal(np.repeat(np.arange(len(ids)), np.diff(histograms.bounds)), keys >> 32)
    assert np.array_equal(histograms.buckets, keys & 0xFFFFFFFF)
    assert np.array_equal(histograms.cells, cells)


def test_threads_do_not_matter(real_store):
    once = every_cell(real_store)
    assert once.bounds[-1] > 100_000
    assert all(same(every_cell(real_store, workers), once) for workers in (2, 3))


def test_cells_without_counts_are_no_trouble(made_up):
    histograms = every_cell(made_up(sp.csr_matrix((3, 2))))
    assert (histograms.bounds.tolist(), np.isnan(histograms.medians()).tolist()) == ([0, 0, 0], [True, True])


def test_the_least_and_the_largest_counts_there_are_have_buckets(made_up):
    counts = np.array([[1e-45, 3.4e38, 0], [0, 0, 1]], np.float32)
    exact, _ = gene_medians(made_up(counts), np.arange(2))
    assert exact.min() < 1e-78
    assert within_the_bound(every_cell(made_up(counts)).medians(), exact)


@pytest.mark.parametrize("wrong", [-1, np.inf])
def test_a_value_that_no_counts_have_is_refused(wrong, made_up):
    with pytest.raises(DataError, match="a count that is negative, infinite or no number"):
        every_cell(made_up(np.array([[1, 2, 3], [5, wrong, 1]], np.float32)))


def test_a_gene_is_called_the_same_whatever_the_order_of_parts(made_up):
    counts, ids = np.ones((2, 3)), ["ENSG00000000003", "ENSG00000000001", "ENSG00000000002"]
    one = every_cell(made_up(counts, ids, symbols=["C", "", "B"], biotypes=["lncRNA", "", ""]))
    other = every_cell(made_up(counts, ids, symbols=["D", "A", "B"], biotypes=["miRNA", "miRNA", ""]))
    for parts in ([one, other], [other, one]):
        genes = Histograms.sum(parts).genes
        assert genes.ids.tolist() == sorted(ids)
        assert genes.symbols.tolist() == ["A", "B", "C"]
        assert genes.biotypes.tolist() == ["miRNA", "", "lncRNA"]


# the file


@pytest.fixture
def saved(made_up, tmp_path):
    """A vocabulary's folder with histograms, and both as they were."""
    counts = np.random.default_rng(3).poisson(0.7, (80, 12))
    biotypes = ["lncRNA", *["protein_coding"] * 11]
    training = TrainingCells.of([made_up(counts, biotypes=biotypes)], SplitSettings(by="cell"), False)
    vocabulary, _ = build_exactly(training)
    counted = Counted.of(training)
    vocabulary.save(tmp_path / "v", lambda folder: counted.write(folder, vocabulary))
    return tmp_path / "v", vocabulary, counted


def test_the_file_holds_all_genes_and_leaves_the_vocabulary_as_it_is(saved, tmp_path):
    folder, vocabulary, counted = saved
    opened = Counted.open(folder, Vocabulary.open(folder))
    assert same(opened.histograms, counted.histograms)
    for field in ("stores", "split", "allow_subset"):
        assert getattr(opened, field) == getattr(counted, field)
    assert len(opened.histograms.genes.ids) == 12 > len(vocabulary.gene_ids)  # of other biotypes too
    assert Vocabulary.open(folder).hash == vocabulary.hash
    Vocabulary.open(folder).save(tmp_path / "copy")  # as models do
    assert sorted(path.name for path in (tmp_path / "copy").iterdir()) == sorted(FILES)


def rewrite(folder, change_meta=lambda meta: meta, change=lambda table: table):
    table = pq.read_table(folder / NAME)
    meta = change_meta(json.loads(table.schema.metadata[b"megacell"]))
    table = change(table).replace_schema_metadata({b"megacell": json.dumps(meta)})
    pq.write_table(table, folder / NAME)


def sign_again(folder, **changes):
    """Change what the file says of itself, with a hash that fits."""
    counted = histogram_file._from_table(pq.read_table(folder / NAME))

    def change(meta):
        meta = {name: value for name, value in {**meta, **changes}.items() if name != "sha256"}
        return {**meta, "sha256": histogram_file._hash(meta, counted)}

    rewrite(folder, change)


def add_a_cell(table):
    cells = table.column("cells").combine_chunks()
    values = cells.flatten().to_numpy().copy()
    values[5] += 1
    altered = pa.LargeListArray.from_arrays(cells.offsets, values)
    return table.set_column(table.column_names.index("cells"), "cells", altered)


def empty_lists(table):
    lists = table.column("buckets").combine_chunks()
    none = pa.array([None] * len(lists), lists.type)
    return table.set_column(table.column_names.index("buckets"), "buckets", none)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / NAME).unlink(), "has no histograms.parquet.*again with --mergeable"),
        (lambda folder: rewrite(folder, change=add_a_cell), "has changed since"),
        (lambda folder: rewrite(folder, lambda meta: {**meta, "allow_subset": True}), "has changed since"),
        (lambda folder: rewrite(folder, change=lambda table: table.drop_columns(["cells"])), "broken"),
        (lambda folder: rewrite(folder, change=empty_lists), "column buckets lacks values"),
        (lambda folder: rewrite(folder, change=lambda table: table[::-1]), "by ascending id"),
        (lambda folder: rewrite(folder, lambda meta: {**meta, "stores": [{}]}), "broken"),
        (lambda folder: (folder / NAME).write_bytes((folder / NAME).read_bytes()[:-9]), "broken"),
        (lambda folder: pq.write_table(pa.table({"a": [1]}), folder / NAME), "broken"),
        (lambda folder: rewrite(folder, lambda meta: {**meta, "format": "other"}), "holds no histograms"),
        (lambda folder: rewrite(folder, lambda meta: {**meta, "version": 2}), "version 2 is newer"),
        (lambda folder: sign_again(folder, vocabulary="0" * 64), "belongs to another vocabulary"),
        (lambda folder: sign_again(folder, bits=9), "buckets of 9 bits, where this program has 8"),
    ],
    ids=["missing", "a count altered", "facts altered", "a column missing", "lists missing", "genes out of order",
         "facts missing", "cut off", "another table",
         "another format", "newer", "of another vocabulary", "other buckets"],
)  # fmt: skip
def test_a_changed_file_or_one_of_another_vocabulary_is_refused_with_the_mend(damage, message, saved):
    folder, vocabulary, _ = saved
    damage(folder)
    with pytest.raises(DataError, match=message):
        Counted.open(folder, vocabulary)


def test_a_failed_write_leaves_nothing(saved, tmp_path, monkeypatch):
    _, vocabulary, counted = saved

    def fail(folder):
        counted.write(folder, vocabulary)
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        vocabulary.save(tmp_path / "w", fail)
    assert [path.name for path in tmp_path.iterdir()] == ["v"]


def test_a_killed_write_leaves_no_vocabulary(saved, tmp_path):
    code = (
        "import os, signal, sys; from megacell.geneformer.vocabulary.vocabulary import Vocabulary\n"
        "def die(folder):\n"
        "    (folder / 'histograms.parquet').write_bytes(b'half'); os.kill(os.getpid(), signal.SIGKILL)\n"
        "Vocabulary.open(sys.argv[1]).save(sys.argv[2], die)"
    )
    done = subprocess.run([sys.executable, "-c", code, saved[0], tmp_path / "w"], env=os.environ)
    assert done.returncode == -signal.SIGKILL
    assert not (tmp_path / "w").exists()
