# SPDX-License-Identifier: Apache-2.0
"""Every input format gives the same cells, and every choice of cells, counts and names does what it says."""

import json

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from layouts import FORMATS, small_blocks

from megacell.core.errors import DataError, UsageError
from megacell.store import CellStore, convert
from megacell.store.sources.source import open_source

ALLOWED = {"allow_subset": True}


@pytest.mark.parametrize("form", FORMATS)
def test_each_format_gives_the_same_cells(form, counts, made, tmp_path, monkeypatch):
    small_blocks(monkeypatch, 700)
    folder = tmp_path / "in"
    folder.mkdir()
    ids = [f"ENSG{i:011d}" for i in range(300)]
    FORMATS[form](folder, counts, ids, made.anndata(counts))
    report = convert(folder, tmp_path / "store", shard_bytes=10_000, **ALLOWED)
    store = CellStore.open(tmp_path / "store")
    assert len(store.manifest.shards) > 1
    np.testing.assert_array_equal(made.all_counts(store, ids), counts)
    assert store.obs.index.tolist() == [f"cell-{i}" for i in range(60)]
    assert report.sources[0].ids == "ensembl"
    if "zarr" in form:
        assert store.obs["kind"].tolist() == ["a", "b"] * 30


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_matrix_comes_back_from_each_format(data, tmp_path_factory):
    shape = data.draw(st.tuples(st.integers(1, 9), st.integers(1, 12)))
    values = st.sampled_from([0, 0, 0, 1, 2, 254, 255, 70_000])
    flat = data.draw(st.lists(values, min_size=shape[0] * shape[1], max_size=shape[0] * shape[1]))
    counts = np.array([*flat[:-1], 1], np.float32).reshape(shape)
    form = data.draw(st.sampled_from([name for name in FORMATS if "zarr" not in name]))
    folder = tmp_path_factory.mktemp("in")
    ids = [f"ENSG{i:011d}" for i in range(shape[1])]
    adata = ad.AnnData(counts, pd.DataFrame(index=[f"cell-{i}" for i in range(shape[0])]), pd.DataFrame(index=ids))
    FORMATS[form](folder, counts, ids, adata)
    (path,) = (p for p in folder.iterdir())
    with open_source(path) as source:
        found = sp.vstack(list(source.blocks(rows=4))).toarray()
        assert list(source.gene_ids) == ids
    np.testing.assert_array_equal(found, counts)


@pytest.mark.parametrize(
    ("form", "damage", "reason"),
    [
        ("mtx", lambda p: (p / "sample/barcodes.tsv.gz").unlink(), "has no barcodes.tsv"),
        ("mtx of old, plain", lambda p: cut(p / "sample/matrix.mtx", 0.7), "its head says|cannot be read"),
        ("mtx", lambda p: cut(p / "sample/matrix.mtx.gz", 0.7), "cannot be read"),
        ("mtx of old, plain", lambda p: put(p / "sample/matrix.mtx", "%%MatrixMarket matrix array"), "cannot be read"),
        ("mtx of old, plain", lambda p: put(p / "sample/genes.tsv", "one column\n"), "ids and names"),
        ("loom", lambda p: cut(p / "f.loom", 0.5), "truncated"),
        ("10x h5 v3", lambda p: drop(p / "f.h5", "matrix/features/id"), "cannot be read"),
        ("h5mu", lambda p: drop(p / "f.h5mu", "mod/rna"), r"has no mod/rna \(modalities: prot\)"),
        ("zarr v3, csr", lambda p: (p / "f.zarr/X/data/c/0").unlink(), "chunks of .*data are missing"),
        ("zarr v2, csc", lambda p: (p / "f.zarr/X/indices/0").unlink(), "chunks of .*indices are missing"),
        ("zarr v2, csc", lambda p: cut(p / "f.zarr/X/indices/0", 0.5), "cannot be read"),
    ],
    ids=[
        "no barcodes",
        "a matrix cut short",
        "gzip cut short",
        "another matrix market",
        "no names",
        "loom cut short",
        "no feature ids",
        "no RNA",
        "no chunk of Zarr 3",
        "no chunk of Zarr 2",
        "a chunk cut short",
    ],
)
def test_a_damaged_input_is_refused_by_name(form, damage, reason, counts, made, tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    FORMATS[form](folder, counts, [f"ENSG{i:011d}" for i in range(300)], made.anndata(counts))
    damage(folder)
    with pytest.raises((DataError, UsageError), match=reason):
        convert(folder, tmp_path / "store", **ALLOWED)
    assert not (tmp_path / "store").exists()


def cut(path, share):
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])


def put(path, text):
    path.write_text(text)


def drop(path, name):
    with h5py.File(path, "r+") as file:
        del file[name]


def test_layers_are_summed_if_asked_for(made, save, tmp_path):
    parts = [sp.csr_matrix(made.counts(60, 300, seed=1)), sp.csc_matrix(made.counts(60, 300, seed=2))]
    data = made.anndata(np.full((60, 300), -1.0))
    data.layers["spliced"], data.layers["unspliced"] = parts
    report = convert(save(data), tmp_path / "store", counts="layers:spliced+unspliced", **ALLOWED)
    assert report.sources[0].matrix == "layers:spliced+unspliced"
    np.testing.assert_array_equal(
        CellStore.open(tmp_path / "store").rows(slice(None)).toarray(), (parts[0] + parts[1]).toarray()
    )
    with pytest.raises(UsageError, match="has no layers:spliced\\+other"):
        convert(save(data), tmp_path / "other", counts="layers:spliced+other", **ALLOWED)


@pytest.fixture
def described(counts, made, save):
    """Cells with metadata to choose by."""
    obs = pd.DataFrame(
        {
            "tissue": pd.Categorical(["lung", "liver", None] * 20),
            "age": np.arange(60),
            "is_primary_data": np.arange(60) != 3,
            "filter_pass": (np.arange(60) != 4).astype(int),
        },
        index=[f"cell-{i}" for i in range(60)],
    )
    return save(made.anndata(counts, obs=obs))


def test_a_query_chooses_cells(described, counts, tmp_path):
    report = convert(described, tmp_path / "store", where="tissue == 'lung' and age > 6", **ALLOWED)
    store = CellStore.open(tmp_path / "store")
    np.testing.assert_array_equal(store.rows(slice(None)).toarray(), counts[9::3])
    assert store.obs["age"].tolist() == list(range(9, 60, 3))
    assert any("tissue == 'lung'" in note for note in report.sources[0].notes)


@pytest.mark.parametrize("query", ["tissu == 'lung'", "age +", "age + 1", "@open('x')", "age.__class__", ""])
def test_a_query_that_is_none_is_wrong_usage(query, described, tmp_path):
    with pytest.raises(UsageError, match="the query"):
        convert(described, tmp_path / "store", where=query, **ALLOWED)


def test_cells_that_a_file_marks_as_failed_or_as_copies_are_skipped(described, counts, tmp_path):
    report = convert(described, tmp_path / "store", **ALLOWED)
    np.testing.assert_array_equal(
        CellStore.open(tmp_path / "store").rows(slice(None)).toarray(), np.delete(counts, [3, 4], 0)
    )
    assert {"1 cells with is_primary_data == False skipped", "1 cells with filter_pass == False skipped"} <= set(
        report.sources[0].notes
    )
    assert convert(described, tmp_path / "all", all_cells=True, **ALLOWED).cells == 60


def test_cells_with_few_counts_or_genes_are_skipped(counts, made, save, tmp_path):
    counts[[5, 59]] = 0
    counts[7, 100:] = 0
    totals, genes = counts.sum(1), (counts > 0).sum(1)
    least, fewest = float(np.percentile(totals, 20)), int(np.percentile(genes, 30))
    expected = counts[(totals >= least) & (genes >= fewest)]
    report = convert(
        save(counts), tmp_path / "store", min_counts=least, min_genes=fewest, shard_bytes=10_000, **ALLOWED
    )
    store = CellStore.open(tmp_path / "store")
    np.testing.assert_array_equal(store.rows(slice(None)).toarray(), expected)
    assert store.obs.index.tolist() == [f"cell-{i}" for i in np.flatnonzero((totals >= least) & (genes >= fewest))]
    assert report.sources[0].cells == len(expected)
    assert any("too few counts or genes" in note for note in report.sources[0].notes)
    with pytest.raises(DataError, match="no cell passes"):
        convert(save(counts), tmp_path / "none", min_counts=1e9, **ALLOWED)


def test_raw_droplets_are_refused_unless_asked_for(made, save, tmp_path):
    droplets = made.counts(60, 300, depth=40.0)
    path = save(droplets)
    with pytest.raises(DataError, match=r"a median of \d+ counts a cell .*--allow-low-counts"):
        convert(path, tmp_path / "store", **ALLOWED)
    report = convert(path, tmp_path / "store", allow_low_counts=True, **ALLOWED)
    assert any("a median of" in note for note in report.sources[0].notes)


def test_an_id_map_names_genes(counts, made, save, tmp_path):
    data = made.anndata(counts)
    data.var = pd.DataFrame(index=[f"probe{i}" for i in range(300)])
    (tmp_path / "map.csv").write_text("".join(f"probe{i},ENSG{i:011d}\n" for i in range(300)))
    report = convert(save(data), tmp_path / "store", id_map=tmp_path / "map.csv", **ALLOWED)
    store = CellStore.open(tmp_path / "store")
    assert store.gene_ids[7] == "ENSG00000000007"
    assert "300 genes named by the id map, from index" in report.sources[0].notes
    for text, kind in (("a,b,c\n", DataError), ("a,b\na,c\n", DataError)):
        (tmp_path / "map.csv").write_text(text)
        with pytest.raises(kind, match=r"map\.csv, line"):
            convert(save(data), tmp_path / "other", id_map=tmp_path / "map.csv", **ALLOWED)


def test_a_sheet_says_what_holds_for_each_file(counts, made, save, tmp_path):
    other = made.counts(40, 300, seed=3)
    data = made.anndata(-other)
    data.layers["mine"] = other
    data.obs["donor_id"] = "wrong"
    save(counts, "a.h5ad"), save(data, "b.h5ad")
    sheet = tmp_path / "samples.csv"
    sheet.write_text("path,counts,donor_id,batch\na.h5ad,,D1,1\nb.h5ad,layer:mine,D2,\n\n")
    convert([], tmp_path / "store", sheet=sheet, **ALLOWED)
    store = CellStore.open(tmp_path / "store")
    np.testing.assert_array_equal(store.rows(slice(None)).toarray(), np.vstack([counts, other]))
    assert store.obs["donor_id"].tolist() == ["D1"] * 60 + ["D2"] * 40
    assert store.obs["batch"].isna().tolist() == [False] * 60 + [True] * 40
    assert [s.matrix for s in store.sources] == ["X", "layer:mine"]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("file\na.h5ad\n", "needs one column named path"),
        ("path\nabsent.h5ad\n", "line 2: no such file 'absent.h5ad'"),
        ("path,x\na.h5ad\n", "line 2: 1 fields, the head has 2"),
        ("path\na.h5ad\na.h5ad\n", "names a file twice"),
        ("", "needs one column named path"),
    ],
)
def test_a_wrong_sheet_is_refused_by_line(text, reason, counts, save, tmp_path):
    save(counts, "a.h5ad")
    (tmp_path / "s.csv").write_text(text)
    with pytest.raises((UsageError, DataError), match=reason):
        convert([], tmp_path / "store", sheet=tmp_path / "s.csv", **ALLOWED)


def test_the_least_version_of_anndata_with_files_of_its_own_is_read(counts, tmp_path):
    """As anndata 0.7 wrote it: categories in uns, a matrix without encoding but with h5sparse's, plain tables."""
    rows = sp.csr_matrix(counts)
    with h5py.File(tmp_path / "old.h5ad", "w") as file:
        group = file.create_group("X")
        group.attrs["encoding-type"], group.attrs["encoding-version"] = "csr_matrix", "0.1.0"
        group.attrs["shape"] = counts.shape
        for name in ("data", "indices", "indptr"):
            group[name] = getattr(rows, name)
        for name, length, pattern in (("obs", 60, "cell-{}"), ("var", 300, "ENSG{:011d}")):
            frame = file.create_group(name)
            frame.attrs["encoding-type"], frame.attrs["encoding-version"] = "dataframe", "0.1.0"
            frame.attrs["_index"] = "_index"
            frame["_index"] = np.array([pattern.format(i) for i in range(length)], object)
            frame.attrs["column-order"] = np.array(["kind"] if name == "obs" else [], h5py.string_dtype())
        file["obs/__categories/kind"] = np.array(["x", "y"], object)
        file["obs/kind"] = np.arange(60, dtype=np.int8) % 2
        file["obs/kind"].attrs["categories"] = file["obs/__categories/kind"].ref
    convert(tmp_path / "old.h5ad", tmp_path / "store", **ALLOWED)
    store = CellStore.open(tmp_path / "store")
    np.testing.assert_array_equal(store.rows(slice(None)).toarray(), counts)
    assert store.obs["kind"].tolist() == ["x", "y"] * 30
    assert json.loads((tmp_path / "store/manifest.json").read_text())["sources"][0]["format"] == "h5ad"
