# SPDX-License-Identifier: Apache-2.0
"""Vocabularies merged, and gone on from as a store grows, against those built of all cells at once."""

import shutil
from pathlib import Path
from tempfile import TemporaryDirectory

import anndata
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from megacell.core.errors import DataError, UsageError
from megacell.geneformer.vocabulary.build import TrainingCells, build_exactly, build_vocabulary
from megacell.geneformer.vocabulary.histogram_file import Counted
from megacell.geneformer.vocabulary.histograms import MEDIAN_ERROR, Histograms
from megacell.geneformer.vocabulary.merge import build_after, merge_vocabularies
from megacell.geneformer.vocabulary.vocabulary import Vocabulary
from megacell.store import CellStore, convert
from megacell.store.sampling.split import SplitSettings, split_cells

BY_CELL = SplitSettings(by="cell")


def build(path, stores, settings=BY_CELL, allow_subset=False, **options):
    """Build a vocabulary with histograms into a folder."""
    training = TrainingCells.of(stores, settings, allow_subset)
    vocabulary, _ = build_exactly(training, **options)
    return save(path, vocabulary, Counted.of(training))


def save(path, vocabulary, counted, _=None):
    vocabulary.save(path, lambda folder: counted.write(folder, vocabulary))
    return path


def agrees(vocabulary, exact):
    """True if the genes and tokens are the same and the medians within the bound."""
    assert vocabulary.gene_ids.tolist() == exact.gene_ids.tolist()
    assert vocabulary.symbols.tolist() == exact.symbols.tolist()
    assert vocabulary.tokens.tolist() == exact.tokens.tolist()
    error = np.abs(vocabulary.medians / exact.medians - 1)
    assert error.max() > 0  # it is not the exact ones that are compared
    return error.max() <= MEDIAN_ERROR * (1 + 1e-9)


# real cells


@pytest.fixture(scope="module")
def folder(data, tmp_path_factory):
    """Stores of the real files apart, of two together, and one that was appended to."""
    folder, cells = tmp_path_factory.mktemp("merge"), data / "cells"
    for name in ("a", "b"):
        convert([cells / f"pbmc4k_{name}.h5ad"], folder / name)
    anndata.read_h5ad(cells / "pbmc4k_a.h5ad")[:700].copy().write_h5ad(folder / "first.h5ad")
    anndata.read_h5ad(cells / "pbmc4k_a.h5ad")[700:].copy().write_h5ad(folder / "rest.h5ad")
    convert([folder / "first.h5ad"], folder / "grown")
    build(folder / "before", [CellStore.open(folder / "grown")])
    build(folder / "by donor", [CellStore.open(folder / "grown")], SplitSettings())
    convert([cells / "pbmc4k_b.h5ad", folder / "rest.h5ad"], folder / "grown", append=True)
    return folder


@pytest.fixture
def grown(folder):
    return CellStore.open(folder / "grown")


def test_real_vocabularies_merged_agree_with_one_built_of_all_cells(folder, tmp_path):
    stores = [CellStore.open(folder / name) for name in ("a", "b")]
    parts = [build(tmp_path / store.path.name, [store], min_cells=200) for store in stores]  # merge has its own limit
    merged, counted, lines = merge_vocabularies(parts)
    exact, _ = build_vocabulary(stores, BY_CELL)
    assert agrees(merged, exact)
    assert lines[0].endswith("medians are within 0.20% of the exact ones")
    assert f"{sum(s.training_cells for s in counted.stores):,} training cells" in lines[1]
    told = merged.provenance
    assert (told["made"], told["median_error"], told["min_cells"]) == ("merged", 2**-9, 10)
    assert told["vocabularies"] == sorted(Vocabulary.open(path).hash for path in parts)
    assert {store["digest"] for store in told["stores"]} == {store.digest for store in stores}
    assert merged.split == BY_CELL.to_dict()
    together = Counted.of(TrainingCells.of(stores, BY_CELL, False))
    assert np.array_equal(counted.histograms.cells, together.histograms.cells)


def test_a_vocabulary_that_goes_on_reads_what_is_new_and_agrees_with_one_built_anew(folder, grown, monkeypatch):
    read = []
    gather = CellStore.gather
    monkeypatch.setattr(
        CellStore, "gather", lambda self, cells, **more: read.append(cells) or gather(self, cells, **more)
    )
    vocabulary, counted, lines = build_after(grown, folder / "before", {}, workers=2)
    cells = np.flatnonzero(split_cells(grown, BY_CELL).train)
    assert np.sort(np.concatenate(read)).tolist() == cells[cells >= 700].tolist()
    monkeypatch.undo()
    old = Counted.open(folder / "before", Vocabulary.open(folder / "before"))
    parts = Histograms.sum([Histograms.count(grown, cells[cells >= 700]), old.histograms])
    assert np.array_equal(counted.histograms.buckets, parts.buckets)
    assert np.array_equal(counted.histograms.cells, parts.cells)
    assert agrees(vocabulary, build_vocabulary(grown, BY_CELL)[0])
    told = vocabulary.provenance
    assert told["after"] == Vocabulary.open(folder / "before").hash
    assert (told["made"], told["median_error"], told["training_cells"]) == ("built after", 2**-9, len(cells))
    assert told["store"] == {"digest": grown.digest, "generation": 2, "cells": len(grown)}
    assert f"{(cells >= 700).sum():,} training cells read, {(cells < 700).sum()} as counted" in lines[1]
    assert "within 0.20%" in lines[1]


def test_one_goes_on_as_often_as_a_store_grows(folder, tmp_path):
    path, cells = tmp_path / "grown", anndata.read_h5ad(folder / "rest.h5ad")
    for step in range(3):
        cells[step * 90 : step * 90 + 90].copy().write_h5ad(tmp_path / f"{step}.h5ad")
        convert([tmp_path / f"{step}.h5ad"], path, append=step > 0)
        if step == 0:
            last = build(tmp_path / "v0", [CellStore.open(path)])
        else:
            last = save(tmp_path / f"v{step}", *build_after(CellStore.open(path), last, {}))
            shutil.rmtree(tmp_path / f"v{step - 1}")  # nothing is read of what came before
    whole = Counted.of(TrainingCells.of([CellStore.open(path)], BY_CELL, False))
    counted = Counted.open(last, Vocabulary.open(last))
    assert np.array_equal(counted.histograms.cells, whole.histograms.cells)
    assert counted.stores == whole.stores


def test_settings_are_as_they_were_unless_told(folder, grown):
    old = Vocabulary.open(folder / "before")
    vocabulary, _, _ = build_after(grown, folder / "before", {"by": "cell", "seed": 0})
    assert (vocabulary.name, vocabulary.split) == (old.name, old.split)
    fewer, _, _ = build_after(grown, folder / "before", {}, min_cells=100, name="other")
    assert (fewer.name, fewer.provenance["min_cells"]) == ("other", 100)
    assert len(fewer.gene_ids) < len(vocabulary.gene_ids)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"given": {"by": "source"}}, "--split-by source: .* was made with cell"),
        ({"given": {"holdout": 0.2}}, "--holdout 0.2: .* was made with 0.1"),
        ({"given": {"seed": 3}}, "--seed 3: .* was made with 0; leave the option out"),
        ({"given": {"test": 0.1}}, "--test 0.1: .* was made with 0.0"),
        ({"given": {}, "allow_subset": True}, "--allow-subset: .* was made without"),
    ],
    ids=["another split", "another share", "another seed", "a test", "subsets"],
)
def test_other_settings_than_before_are_refused(given, message, folder, grown):
    with pytest.raises(UsageError, match=message):
        build_after(grown, folder / "before", **given)


def test_another_store_is_refused(folder):
    with pytest.raises(DataError, match=r"/b: does not begin with the 700 cells that .*before was made of"):
        build_after(CellStore.open(folder / "b"), folder / "before", {})


def test_a_store_that_has_not_grown_is_refused(folder):
    with pytest.raises(DataError, match=r"nothing was appended since .*before was made"):
        build_after(CellStore.open(folder / "grown", 1), folder / "before", {})


def test_a_split_that_files_to_come_have_moved_is_refused(folder, grown):
    with pytest.raises(DataError, match=r"others of the earlier ones are trained on .*--split-by cell"):
        build_after(grown, folder / "by donor", {})


def test_a_vocabulary_of_several_stores_does_not_go_on(folder, grown, tmp_path):
    both = build(tmp_path / "both", [CellStore.open(folder / name) for name in ("a", "b")])
    with pytest.raises(DataError, match="of 2 stores; go on from the vocabulary of one"):
        build_after(grown, both, {})


def test_one_store_is_not_counted_twice_whatever_its_generation(folder, grown, tmp_path):
    after = save(tmp_path / "after", *build_after(grown, folder / "before", {}))
    for other in (folder / "before", after):
        with pytest.raises(DataError, match=r"counts cells of (1 input file|3 input files) that .*after counts too"):
            merge_vocabularies([after, other])


# made-up cells


def made(made_up, path, seed, settings=BY_CELL, cells=60, **changes):
    counts = np.random.default_rng(seed).poisson(0.6, (cells, 12))
    store = made_up(counts, sources=[f"{path.name}.h5ad"] * cells, **changes)
    return build(path, [store], settings, name=path.name)


@settings(max_examples=30)
@given(
    counts=arrays(np.int64, st.tuples(st.integers(4, 40), st.just(5)), elements=st.sampled_from([0, 1, 1, 2, 3, 700])),
    cut=st.floats(0, 1),
    least=st.integers(1, 4),
)
def test_wherever_a_store_was_cut_going_on_agrees_with_building_anew(counts, cut, least, made_up):
    """The store in memory has one generation: the earlier ones need not be there any more."""
    counts[:, 0] = 1
    everyone, known = SplitSettings(by="cell", holdout=0), 1 + int(cut * (len(counts) - 2))
    with TemporaryDirectory() as folder:
        before = build(Path(folder, "before"), [made_up(counts[:known])], everyone, min_cells=1)
        vocabulary, _, _ = build_after(made_up(counts), before, {}, min_cells=least)
    exact, _ = build_vocabulary(made_up(counts), everyone, min_cells=least)
    assert vocabulary.gene_ids.tolist() == exact.gene_ids.tolist()
    assert (np.abs(vocabulary.medians / exact.medians - 1) <= MEDIAN_ERROR * (1 + 1e-9)).all()


def test_neither_order_nor_grouping_matters(made_up, tmp_path):
    a, b, c = (made(made_up, tmp_path / name, seed) for seed, name in enumerate("abc"))
    ab = save(tmp_path / "ab", *merge_vocabularies([a, b]))
    bc = save(tmp_path / "bc", *merge_vocabularies([c, b]))
    ways = [[a, b, c], [c, b, a], [b, a, c], [ab, c], [bc, a]]
    merged = [save(tmp_path / f"{i}", *merge_vocabularies(way, name="all")) for i, way in enumerate(ways)]
    assert len({Vocabulary.open(path).hash for path in merged}) == 1
    assert len({(path / "histograms.parquet").read_bytes() for path in merged}) == 1


def test_genes_that_are_in_enough_cells_together_are_in(made_up, tmp_path):
    counts = np.ones((9, 3))
    counts[:, 0] = 2
    counts[:6, 2] = 0  # in three cells of each
    everyone = SplitSettings(by="cell", holdout=0)
    stores = [made_up(counts, sources=[f"{name}.h5ad"] * 9) for name in "ab"]
    parts = [build(tmp_path / f"{i}", [store], everyone, min_cells=7) for i, store in enumerate(stores)]
    assert [len(Vocabulary.open(path).gene_ids) for path in parts] == [2, 2]
    assert len(merge_vocabularies(parts, min_cells=6)[0].gene_ids) == 3
    assert len(merge_vocabularies(parts, min_cells=7)[0].gene_ids) == 2
    with pytest.raises(DataError, match="no gene is in 19 of 18 training cells; lower --min-cells"):
        merge_vocabularies(parts, min_cells=19)


def test_only_ranked_biotypes_get_a_token(made_up, tmp_path):
    biotypes = ["protein_coding", "miRNA", "lncRNA", *[""] * 9]
    parts = [made(made_up, tmp_path / name, seed, biotypes=biotypes) for seed, name in enumerate("ab")]
    merged, counted, _ = merge_vocabularies(parts)
    assert merged.gene_ids.tolist() == [f"ENSG{g:011d}" for g in range(12) if g != 2]
    assert len(counted.histograms.genes.ids) == 12


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (SplitSettings(), "b: made with --split-by auto, but .*a with cell"),
        (SplitSettings(by="cell", holdout=0.2), "b: made with --holdout 0.2, but .*a with 0.1"),
        (SplitSettings(by="cell", seed=1), "b: made with --seed 1, but .*a with 0"),
        (SplitSettings(by="cell", test=0.1), "b: made with --test 0.1, but .*a with 0.0"),
    ],
    ids=["by", "share", "seed", "test"],
)
def test_vocabularies_of_other_splits_are_not_merged(settings, message, made_up, tmp_path):
    parts = [made(made_up, tmp_path / "a", 1), made(made_up, tmp_path / "b", 2, settings)]
    with pytest.raises(DataError, match=message):
        merge_vocabularies(parts)


def test_vocabularies_with_and_without_subsets_are_not_merged(made_up, tmp_path):
    counts = np.random.default_rng(0).poisson(0.6, (60, 12))
    other = build(tmp_path / "b", [made_up(counts, sources=["b.h5ad"] * 60)], allow_subset=True)
    with pytest.raises(DataError, match=r"b: made with --allow-subset True, but .*a with False"):
        merge_vocabularies([made(made_up, tmp_path / "a", 1), other])


def test_a_vocabulary_without_histograms_is_refused_with_the_mend(made_up, vocabulary_for, tmp_path):
    vocabulary_for().save(tmp_path / "b")
    with pytest.raises(DataError, match=r"b: has no histograms.parquet.*build the vocabulary again with --mergeable"):
        merge_vocabularies([made(made_up, tmp_path / "a", 1), tmp_path / "b"])


def test_a_single_vocabulary_is_nothing_to_merge(made_up, tmp_path):
    with pytest.raises(UsageError, match="give two vocabularies or more"):
        merge_vocabularies([made(made_up, tmp_path / "a", 1)])
