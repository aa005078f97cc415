# SPDX-License-Identifier: Apache-2.0
"""Real files in three layouts: what the store holds equals what AnnData reads, cell by cell."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

from megacell.core.errors import DataError
from megacell.store import CellStore, convert


@pytest.fixture(scope="module")
def store(real_cells: Path, tmp_path_factory: pytest.TempPathFactory) -> CellStore:
    path = tmp_path_factory.mktemp("real") / "cells.store"
    convert(real_cells, path)
    return CellStore.open(path)


def first_cell(store: CellStore, name: str) -> int:
    sources = [source.name for source in store.sources]
    return sum(source.cells for source in store.sources[: sources.index(name)])


@pytest.mark.parametrize(
    ("name", "matrix", "ids"),
    [
        ("pbmc4k_a", lambda a: a.X, lambda a: a.var_names),
        ("pbmc4k_b", lambda a: a.raw.X, lambda a: a.raw.var["ensembl_id"]),
    ],
    ids=["counts in X with Ensembl ids as index", "counts in raw with ids in a column"],
)
def test_counts_equal_anndatas_cell_by_cell(real_cells, store, name, matrix, ids):
    data = ad.read_h5ad(real_cells / f"{name}.h5ad")
    expected = sp.csr_matrix(matrix(data))
    number = {gene: i for i, gene in enumerate(store.gene_ids)}
    columns = np.array([number[gene] for gene in ids(data)])
    first = first_cell(store, name)
    for cell in range(data.n_obs):
        row = store.rows([first + cell])
        wanted = expected[cell]
        order = np.argsort(columns[wanted.indices])
        np.testing.assert_array_equal(row.indices, columns[wanted.indices][order])
        np.testing.assert_array_equal(row.data, wanted.data[order])
    assert list(store.obs.index[first : first + data.n_obs]) == list(data.obs_names)


def test_symbols_are_mapped_by_the_other_files_and_no_count_is_lost(real_cells, store):
    data = ad.read_h5ad(real_cells / "pbmc5k_protein.h5ad")
    first = first_cell(store, "pbmc5k_protein")
    rows = store.rows(np.arange(first, first + data.n_obs))
    known = dict(zip(store.symbols, range(len(store.symbols)), strict=True))
    np.testing.assert_array_equal(rows.sum(axis=1).A1, np.asarray(data.X).sum(axis=1))
    for symbol in ("CD3E", "MS4A1", "LYZ", "NKG7"):
        assert store.gene_ids[known[symbol]].startswith("ENSG")
        expected = np.asarray(data[:, symbol].X).ravel()
        np.testing.assert_array_equal(rows[:, known[symbol]].toarray().ravel(), expected)


def test_antibody_columns_do_not_become_genes(real_cells, tmp_path):
    """As Cell Ranger writes CITE-seq: RNA and antibodies in one matrix, told apart by feature_types only."""
    data = ad.read_h5ad(real_cells / "pbmc5k_protein.h5ad")
    proteins = data.obsm["protein_expression"]
    names = [str(name).split("_")[0] for name in data.uns["protein_names"]]
    types = ["Gene Expression"] * data.n_vars + ["Antibody Capture"] * proteins.shape[1]
    var = pd.DataFrame({"feature_types": types}, index=[*data.var_names, *names])
    both = ad.AnnData(np.hstack([np.asarray(data.X), proteins]).astype(np.float32), obs=data.obs, var=var)
    both.write_h5ad(tmp_path / "cite.h5ad")
    report = convert(tmp_path / "cite.h5ad", tmp_path / "store")
    store = CellStore.open(tmp_path / "store")
    assert store.rows(slice(None)).sum() == np.asarray(data.X).sum()
    assert len(store.gene_ids) == data.n_vars
    assert "29 Antibody Capture features dropped" in report.sources[0].notes


def test_obs_is_kept_with_missing_values_and_the_source(real_cells, store):
    data = ad.read_h5ad(real_cells / "pbmc4k_a.h5ad")
    own = store.obs.iloc[: data.n_obs]
    expected = data.obs["cell_type"].astype(object)
    np.testing.assert_array_equal(own["cell_type"].isna(), expected.isna())
    assert (own["cell_type"].astype(object)[expected.notna()] == expected[expected.notna()]).all()
    assert store.obs["source"].value_counts().to_dict() == {"pbmc4k_a": 1100, "pbmc4k_b": 1070, "pbmc5k_protein": 200}
    assert store.obs["n_genes"].isna().sum() == 2170  # a column of the third file only


def test_panels_say_what_each_source_measured(real_cells, store):
    data = ad.read_h5ad(real_cells / "pbmc4k_b.h5ad")
    measured = store.gene_ids[store.panel(1)]
    assert set(measured) == set(data.raw.var["ensembl_id"])
    assert (np.diff(store.panel(1).astype(int)) > 0).all()


def test_rounded_cp10k_of_real_cells_is_refused(real_cells, save: Callable[..., Path], tmp_path):
    data = ad.read_h5ad(real_cells / "pbmc4k_a.h5ad")
    totals = data.X.sum(axis=1).A1
    data.X = (sp.diags(1e4 / totals) @ data.X).tocsr()
    data.X.data = np.round(data.X.data)
    path = save(data)
    reason = (
        r"made\.h5ad: no counts found \(X has near-constant totals.*no matrix of the file holds counts, or values that"
    )
    with pytest.raises(DataError, match=reason):
        convert(path, tmp_path / "store")
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize("target", [1e4, 3000.0], ids=["CP10k", "scaled to about the median"])
def test_log_values_of_real_cells_are_refused_and_recovered(real_cells, made: SimpleNamespace, tmp_path, target):
    data = ad.read_h5ad(real_cells / "pbmc4k_a.h5ad")
    counts = data.X.copy()
    totals = counts.sum(axis=1).A1
    data.X = (sp.diags((target / totals).astype(np.float32)) @ counts).tocsr().astype(np.float32)
    data.X.data = np.log1p(data.X.data)
    path = tmp_path / "log.h5ad"
    data.write_h5ad(path)
    with pytest.raises(DataError, match="X has log-normalised values"):
        convert(path, tmp_path / "store")
    convert(path, tmp_path / "store", counts="recover")
    recovered = made.all_counts(CellStore.open(tmp_path / "store"), data.var_names)
    np.testing.assert_array_equal(recovered, counts.toarray())


def test_scanpys_pbmc_recovers_whole_counts(made: SimpleNamespace, tmp_path):
    """Its raw holds log values rounded to three decimals: division by the smallest is off by up to 0.11."""
    import scanpy

    data = scanpy.datasets.pbmc68k_reduced()
    data.write_h5ad(tmp_path / "pbmc68k.h5ad")
    convert(tmp_path / "pbmc68k.h5ad", tmp_path / "store", counts="recover", allow_subset=True)
    counts = made.all_counts(CellStore.open(tmp_path / "store"), data.raw.var_names).astype(np.float64)
    stored = np.asarray(data.raw.X.todense(), np.float64)
    assert (counts == np.round(counts)).all()
    assert ((counts > 0) == (stored > 0)).all()
    for cell in range(len(counts)):  # one scale brings each count of a cell back to the stored value
        seen = counts[cell] > 0
        low = (np.expm1(stored[cell, seen] - 5.01e-4) / counts[cell, seen]).max()
        high = (np.expm1(stored[cell, seen] + 5.01e-4) / counts[cell, seen]).min()
        assert low <= high


def test_a_layer_of_variable_genes_is_never_taken_over_a_fuller_raw(real_cells, tmp_path):
    data = ad.read_h5ad(real_cells / "pbmc4k_b.h5ad")
    raw = data.raw.to_adata()
    data.layers["counts"] = raw[:, data.var_names].X
    raw.X.data = np.log1p(raw.X.data * np.float32(0.37))
    data.raw = raw
    data.write_h5ad(tmp_path / "hvg.h5ad")
    with pytest.raises(DataError, match=r"layer:counts holds counts of only 8,000 genes.*raw has 13,558 genes but"):
        convert(tmp_path / "hvg.h5ad", tmp_path / "store")
    with pytest.raises(DataError, match=r"measures only 8,000 genes.*--allow-subset"):
        convert(tmp_path / "hvg.h5ad", tmp_path / "store", counts="layer:counts")
    report = convert(tmp_path / "hvg.h5ad", tmp_path / "store", counts="layer:counts", allow_subset=True)
    assert report.sources[0].subset
