# SPDX-License-Identifier: Apache-2.0
"""Genes, ids and species: found by content, dropped, summed or refused by rule."""

import anndata as ad
import numpy as np
import pandas as pd
import pytest

from megacell.core.errors import DataError, UsageError
from megacell.store import CellStore, convert
from megacell.store.format.gene_table import GeneTable
from megacell.store.sources.features import read_features, symbol_map

ALLOWED = {"allow_subset": True}
ENSEMBL = [f"ENSG{i:011d}" for i in range(6)]
SYMBOLS = ["TP53", "CD3E", "MT-CO1", "C1orf112", "HLA-A", "GAPDH"]


@pytest.mark.parametrize(
    "var",
    [
        pd.DataFrame(index=ENSEMBL),
        pd.DataFrame({"ensembl_id": ENSEMBL}, index=SYMBOLS),
        pd.DataFrame({"gene_ids": pd.Categorical(ENSEMBL)}, index=SYMBOLS),
        pd.DataFrame({"feature_id": ENSEMBL, "n_cells": range(6)}, index=SYMBOLS),
        pd.DataFrame({"whatever": [f"{gene}.{i + 1}" for i, gene in enumerate(ENSEMBL)]}, index=SYMBOLS),
        pd.DataFrame({"feature_name": SYMBOLS, "soma_id": ENSEMBL}, index=[str(i) for i in range(6)]),
    ],
    ids=["index", "ensembl_id", "categorical gene_ids", "feature_id", "versions in any column", "numbered index"],
)
def test_ensembl_ids_are_found_by_content(var):
    features = read_features(var, "here")
    assert list(features.gene_ids) == ENSEMBL
    assert features.ids == "ensembl"
    if len(var.columns):
        assert list(features.symbols) == SYMBOLS


def test_versions_are_cut_only_from_ensembl_ids():
    names = ["ENSG00000000001.12", "ENSG00000000002.3_PAR_Y", "AC012345.1", "RP11-34P13.7"]
    features = read_features(pd.DataFrame(index=names), "here")
    assert list(features.gene_ids) == ["ENSG00000000001", "ENSG00000000002", "AC012345.1", "RP11-34P13.7"]


def test_a_named_column_is_taken_and_an_absent_one_is_wrong_usage():
    var = pd.DataFrame({"mine": ["a", "b"], "other": ["c", "d"]}, index=["E1", "E2"])
    assert list(read_features(var, "here", "mine").gene_ids) == ["a", "b"]
    with pytest.raises(
        UsageError, match=r"here: has no text column 'theirs' in var; --gene-ids can be index, mine, other"
    ):
        read_features(var, "here", "theirs")


def test_numbered_genes_are_refused():
    with pytest.raises(DataError, match=r"genes are numbered, not named.*--gene-ids COLUMN"):
        read_features(pd.DataFrame(index=[str(i) for i in range(9)]), "here")


def test_only_gene_expression_is_kept(counts, save, tmp_path):
    types = ["Gene Expression"] * 290 + ["Antibody Capture"] * 4 + ["CRISPR Guide Capture"] * 3 + ["Peaks"] * 3
    var = pd.DataFrame({"feature_types": types}, index=[f"GENE{i}" for i in range(300)])
    report = convert(save(ad.AnnData(counts, var=var)), tmp_path / "store", **ALLOWED)
    store = CellStore.open(tmp_path / "store")
    np.testing.assert_array_equal(store.rows(slice(None)).toarray(), counts[:, :290])
    assert {"4 Antibody Capture features dropped", "3 Peaks features dropped"} <= set(report.sources[0].notes)


def test_features_that_are_no_genes_are_known_by_name_where_no_type_is_given(counts, save, tmp_path):
    names = [f"GENE{i}" for i in range(296)] + ["ERCC-00002", "ERCC-00170", "CD3_TotalSeqB", "HTO-1"]
    convert(save(ad.AnnData(counts, var=pd.DataFrame(index=names))), tmp_path / "store", **ALLOWED)
    assert CellStore.open(tmp_path / "store").shape == (60, 296)


def test_types_of_the_main_table_hold_for_raw_too(counts, save, made, tmp_path):
    var = pd.DataFrame(
        {"feature_types": ["Gene Expression"] * 299 + ["Antibody Capture"]}, index=[f"G{i}" for i in range(300)]
    )
    data = ad.AnnData(np.log1p(counts), var=var)
    data.raw = ad.AnnData(counts, var=var[[]])
    convert(save(data), tmp_path / "store", **ALLOWED)
    np.testing.assert_array_equal(CellStore.open(tmp_path / "store").rows(slice(None)).toarray(), counts[:, :299])


def test_equal_ids_are_summed_and_said(counts, save, tmp_path):
    ids = [f"ENSG{i // 2:011d}.{i}" for i in range(300)]
    report = convert(save(ad.AnnData(counts, var=pd.DataFrame(index=ids))), tmp_path / "store", **ALLOWED)
    store = CellStore.open(tmp_path / "store")
    np.testing.assert_array_equal(store.rows(slice(None)).toarray(), counts[:, ::2] + counts[:, 1::2])
    assert "150 columns share an id with another: summed" in report.sources[0].notes


def test_symbols_are_mapped_where_one_id_is_meant():
    first = (["ENSG00000000001", "ENSG00000000002", "ENSG00000000003"], ["TP53", "TBCE", "MYC"])
    second = (["ENSG00000000001", "ENSG00000000009", "MYCL"], ["TP53", "TBCE", "MYCL"])
    assert symbol_map([first, second]).to_dict() == {"TP53": "ENSG00000000001", "MYC": "ENSG00000000003"}


def test_symbols_only_are_mapped_by_the_store_they_are_appended_to(counts, made, save, tmp_path):
    convert(save(counts, "a.h5ad"), tmp_path / "store", **ALLOWED)
    later = made.counts(60, 300, seed=5)
    named = ad.AnnData(later, var=pd.DataFrame(index=[f"GENE{i}" for i in range(150, 450)]))
    report = convert(save(named, "b.h5ad"), tmp_path / "store", append=True, **ALLOWED)
    store = CellStore.open(tmp_path / "store")
    assert "symbols only: 150 have an id by the other sources, 150 keep their symbol" in report.sources[0].notes
    wanted = [f"ENSG{i:011d}" for i in range(150, 300)] + [f"GENE{i}" for i in range(300, 450)]
    np.testing.assert_array_equal(made.all_counts(store, wanted)[60:], later)


def test_made_unique_symbols_are_reported_as_ambiguous(counts, save, tmp_path):
    names = ["TBCE", "TBCE-1", "NKX2-1"] + [f"GENE{i}" for i in range(297)]
    report = convert(save(ad.AnnData(counts, var=pd.DataFrame(index=names))), tmp_path / "store", **ALLOWED)
    assert "1 ambiguous symbols" in report.sources[0].notes


def test_a_genes_number_never_changes():
    table = GeneTable(["a", "b"], ["", "B"], ["", ""])
    assert table.add(["c", "b", "a"], ["C", "x", "A"], ["", "", "rna"]).tolist() == [2, 1, 0]
    found = [list(texts) for texts in (table.gene_ids, table.symbols, table.biotypes)]
    assert found == [["a", "b", "c"], ["A", "B", "C"], ["rna", "", ""]]


def test_few_genes_are_refused_unless_allowed_and_then_recorded(counts, save, tmp_path):
    path = save(counts)
    with pytest.raises(DataError, match=r"made\.h5ad: X measures only 300 genes.*--allow-subset"):
        convert(path, tmp_path / "store")
    assert convert(path, tmp_path / "store", **ALLOWED).sources[0].subset


@pytest.mark.parametrize(
    ("names", "obs", "uns", "reason"),
    [
        ([f"ENSMUSG{i:011d}" for i in range(300)], {}, {}, "gene ids say mouse"),
        ([f"Gene{i}" for i in range(300)], {}, {}, "symbols are written as for mouse"),
        ([f"GENE{i}" for i in range(300)], {"organism": "Mus musculus"}, {}, "the file says mouse"),
        ([f"GENE{i}" for i in range(300)], {"organism_ontology_term_id": "NCBITaxon:10090"}, {}, "the file says mouse"),
        ([f"GENE{i}" for i in range(300)], {}, {"organism": "Danio rerio"}, "the file says zebrafish"),
        (
            [f"ENSG{i:011d}" for i in range(300)],
            {"organism": "Mus musculus"},
            {},
            "gene ids say human, the file says mouse",
        ),
    ],
    ids=["mouse ids", "mouse symbols", "organism column", "ontology column", "organism in uns", "ids against the file"],
)
def test_another_species_is_refused_with_its_evidence(names, obs, uns, reason, counts, save, tmp_path):
    data = ad.AnnData(counts, var=pd.DataFrame(index=names), uns=uns)
    for column, value in obs.items():
        data.obs[column] = pd.Categorical([value] * 60)
    with pytest.raises(DataError, match=rf"{reason}, but the store is of human cells; .*--species"):
        convert(save(data), tmp_path / "store", **ALLOWED)


def test_two_species_in_one_file_are_refused_whatever_is_allowed(counts, save, tmp_path):
    names = [f"ENSG{i:011d}" for i in range(150)] + [f"ENSMUSG{i:011d}" for i in range(150)]
    path = save(ad.AnnData(counts, var=pd.DataFrame(index=names)))
    for species in (None, "human", "mouse"):
        with pytest.raises(DataError, match="genes of human and mouse together"):
            convert(path, tmp_path / "store", species=species, **ALLOWED)
    names = [f"GRCh38_GENE{i}" for i in range(150)] + [f"mm10___Gene{i}" for i in range(150)]
    with pytest.raises(DataError, match="genes of human and mouse together"):
        convert(save(ad.AnnData(counts, var=pd.DataFrame(index=names))), tmp_path / "store", **ALLOWED)


def test_a_store_of_mouse_cells_stays_one(counts, made, save, tmp_path):
    mouse = save(counts, "mouse.h5ad", prefix="ENSMUSG")
    assert convert(mouse, tmp_path / "store", species="mouse", **ALLOWED).sources[0].species == "mouse"
    human = save(made.counts(60, 300, seed=2), "human.h5ad")
    with pytest.raises(DataError, match=r"gene ids say human, but the store is of mouse cells"):
        convert(human, tmp_path / "store", append=True, **ALLOWED)
    with pytest.raises(UsageError, match="holds mouse cells, not human"):
        convert(human, tmp_path / "store", append=True, species="human", **ALLOWED)


def test_an_explicit_species_settles_what_ids_and_file_dispute(counts, save, tmp_path):
    data = ad.AnnData(counts, var=pd.DataFrame(index=[f"ENSG{i:011d}" for i in range(300)]))
    data.obs["organism"] = "Mus musculus"  # a mouse host of human cells
    assert convert(save(data), tmp_path / "store", species="human", **ALLOWED).sources[0].species == "human"
