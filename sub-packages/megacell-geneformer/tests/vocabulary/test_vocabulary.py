# SPDX-License-Identifier: Apache-2.0
"""The vocabulary's directory and hash, how genes find their tokens, and which files it fits."""

import json

import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

from megacell.core.errors import DataError, UsageError
from megacell.geneformer.tokens.rank_encoder import rank_encode
from megacell.geneformer.vocabulary import vocabulary as vocabulary_module
from megacell.geneformer.vocabulary.vocabulary import Vocabulary, check_coverage


@pytest.mark.parametrize("edition", ["V1", "V2"])
def test_a_saved_vocabulary_opens_as_it_was(edition, published, tmp_path):
    vocabulary = published[edition]
    vocabulary.save(tmp_path / "vocabulary")
    opened = Vocabulary.open(tmp_path / "vocabulary")
    for name in ("gene_ids", "symbols", "tokens", "medians"):
        assert np.array_equal(getattr(opened, name), getattr(vocabulary, name))
        assert getattr(opened, name).dtype == getattr(vocabulary, name).dtype
    for name in ("name", "specials", "prefix", "suffix", "max_length", "aliases", "provenance", "hash", "size"):
        assert getattr(opened, name) == getattr(vocabulary, name)
    assert [p.name for p in tmp_path.iterdir()] == ["vocabulary"]  # nothing temporary is left


def test_saving_never_replaces_what_is_there(vocabulary_for, tmp_path):
    (tmp_path / "there").mkdir()
    with pytest.raises(UsageError, match="exists"):
        vocabulary_for().save(tmp_path / "there")
    assert list((tmp_path / "there").iterdir()) == []


def test_a_failed_save_leaves_nothing(vocabulary_for, tmp_path, monkeypatch):
    monkeypatch.setattr("pyarrow.parquet.write_table", lambda *_, **__: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        vocabulary_for().save(tmp_path / "vocabulary")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "change",
    [
        {"name": "another"},
        {"medians": np.linspace(0.5, 3.0, 20) * (1 + 2**-52)},
        {"tokens": np.arange(5, 25, dtype=np.int32)},
        {"symbols": np.array(["x"] * 20, object)},
        {"max_length": 65},
        {"suffix": ()},
        {"aliases": {"OLD": "ENSG00000000003"}},
        {"provenance": {"made": "otherwise"}},
    ],
    ids=lambda change: next(iter(change)),
)
def test_the_hash_tells_any_two_vocabularies_apart(change, vocabulary_for):
    assert vocabulary_for(**change).hash != vocabulary_for().hash
    assert vocabulary_for().hash == vocabulary_for().hash


def alter_json(folder):
    meta = json.loads((folder / "vocabulary.json").read_text())
    meta["max_length"] = 32
    (folder / "vocabulary.json").write_text(json.dumps(meta))


def alter_median(folder):
    genes = pd.read_parquet(folder / "genes.parquet")
    genes.loc[7, "median"] += 0.25
    genes.to_parquet(folder / "genes.parquet")


def cut_off(folder):
    content = (folder / "genes.parquet").read_bytes()
    (folder / "genes.parquet").write_bytes(content[: len(content) // 2])


def make_newer(folder):
    meta = json.loads((folder / "vocabulary.json").read_text())
    (folder / "vocabulary.json").write_text(json.dumps({**meta, "version": 2}))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (alter_json, "has changed"),
        (alter_median, "has changed"),
        (cut_off, "broken vocabulary"),
        (make_newer, "version 2 is newer"),
        (lambda folder: (folder / "aliases.parquet").unlink(), "aliases.parquet is missing"),
        (lambda folder: (folder / "vocabulary.json").write_text("{}"), "not a vocabulary"),
        (lambda folder: (folder / "vocabulary.json").write_text("[]"), "not a vocabulary"),
        (lambda folder: (folder / "vocabulary.json").write_text("nothing"), "broken vocabulary"),
    ],
    ids=["json altered", "median altered", "table cut off", "newer", "file missing", "empty", "a list", "no json"],
)
def test_a_changed_or_broken_directory_is_refused(damage, message, vocabulary_for, tmp_path):
    vocabulary_for().save(tmp_path / "vocabulary")
    damage(tmp_path / "vocabulary")
    with pytest.raises(DataError, match=message):
        Vocabulary.open(tmp_path / "vocabulary")


def test_a_path_that_is_no_directory_is_refused(tmp_path):
    with pytest.raises(DataError, match="not a vocabulary"):
        Vocabulary.open(tmp_path / "absent")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"genes": 0}, "no genes"),
        ({"medians": np.zeros(20)}, "median"),
        ({"medians": np.full(20, np.nan)}, "median"),
        ({"medians": np.ones(19)}, "lengths"),
        ({"tokens": np.zeros(20, np.int32)}, "a token stands twice"),
        ({"tokens": np.arange(3, 23, dtype=np.int32)}, "a token stands twice"),
        ({"tokens": np.arange(-25, -5, dtype=np.int32)}, "negative token"),
        ({"gene_ids": np.array(["a"] * 20, object)}, "a gene id stands twice"),
        ({"specials": {"pad": 0}}, "pad and mask"),
        ({"suffix": (9,)}, "prefix or suffix"),
        ({"max_length": 2}, "no room"),
        ({"aliases": {"OLD": "unheard-of"}}, "alias"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_parts_that_do_not_fit_are_refused(change, message, vocabulary_for):
    with pytest.raises(DataError, match=message):
        vocabulary_for(**change)


class TestTokensOfGenes:
    """Which token a gene of a file has."""

    def test_ids_are_cleaned_of_versions_space_and_case(self, vocabulary_for):
        ids = ["ENSG00000000002", " ENSG00000000002 ", "ensg00000000002", "ENSG00000000002.17", "ENSG00000000099"]
        assert vocabulary_for().tokens_of(ids).tolist() == [6, 6, 6, 6, -1]

    def test_only_ensembl_ids_lose_what_looks_like_a_version(self, vocabulary_for):
        symbols = np.array(["AC000123"] + [""] * 19, object)
        assert vocabulary_for(symbols=symbols).tokens_of(["AC000123", "AC000123.1"]).tolist() == [4, -1]

    def test_aliases_and_symbols_lead_to_genes(self, vocabulary_for):
        vocabulary = vocabulary_for(aliases={"OLD": "ENSG00000000003", "ENSG00000000777": "ENSG00000000004"})
        ids = ["old", "ENSG00000000777", "gene5", "GENE6"]
        assert vocabulary.tokens_of(ids).tolist() == [7, 8, 9, 10]

    def test_a_symbol_decides_only_where_one_side_has_no_ensembl_id(self, vocabulary_for):
        vocabulary = vocabulary_for()
        assert vocabulary.tokens_of(
            ["17", "ENSG00000000777", "ENSG00000000001"], ["GENE5", "GENE5", "GENE5"]
        ).tolist() == [
            9,
            -1,
            5,
        ]
        by_symbol = vocabulary_for(gene_ids=np.array([f"GENE{g}" for g in range(20)], object))
        assert by_symbol.tokens_of(["ENSG00000000777"], ["gene5"]).tolist() == [9]

    def test_an_ambiguous_symbol_leads_nowhere(self, vocabulary_for):
        symbols = np.array(["TWICE", "twice", "ONCE"] + [""] * 17, object)
        assert vocabulary_for(symbols=symbols).tokens_of(["TWICE", "ONCE", ""]).tolist() == [-1, 6, -1]

    def test_v2_takes_the_genes_that_geneformers_own_map_takes(self, published, dictionaries):
        from megacell.geneformer.vocabulary.geneformer_dictionaries import read_dictionary

        mapping = read_dictionary(dictionaries["V2"]["gene_ids"], str)
        tokens = read_dictionary(dictionaries["V2"]["tokens"], int)
        names = list(mapping)
        expected = [tokens.get(mapping[name], -1) for name in names]
        assert published["V2"].tokens_of(names).tolist() == expected

    def test_an_empty_list_has_no_tokens(self, vocabulary_for):
        assert vocabulary_for().tokens_of([]).tolist() == []


class TestCoverage:
    """Which files a vocabulary fits."""

    @pytest.mark.parametrize(("name", "least"), [("pbmc4k_a", 0.6), ("pbmc4k_b", 0.4), ("pbmc5k_protein", 0.4)])
    @pytest.mark.parametrize("edition", ["V1", "V2"])
    def test_real_files_are_covered(self, name, least, edition, real_cells, published):
        _, ids = real_cells[name]
        share = check_coverage(ids, None, published[edition], name)
        known = set(published[edition].tokens_of(ids).tolist()) - {-1}
        assert share == len(known) / len(published[edition].gene_ids) > least

    def test_under_a_quarter_is_refused_naming_the_file(self, published):
        ids = published["V2"].gene_ids[:5000]
        with pytest.raises(DataError, match=r"some\.h5ad: measures 24\.7%.*wrong dictionary, species"):
            check_coverage(ids, None, published["V2"], "some.h5ad")

    def test_an_allowed_subset_passes_with_a_line(self, published, monkeypatch):
        said: list[str] = []
        monkeypatch.setattr(vocabulary_module.log, "warning", lambda text, *values: said.append(text % values))
        share = check_coverage(published["V2"].gene_ids[:1000], None, published["V2"], "some.h5ad", allow=True)
        assert share == pytest.approx(1000 / 20_271)
        assert ["some.h5ad: measures 4.9%" in line for line in said] == [True]

    def test_a_quarter_is_enough(self, vocabulary_for):
        vocabulary = vocabulary_for()
        assert check_coverage(vocabulary.gene_ids[:5], None, vocabulary, "x") == 0.25

    def test_mouse_ids_are_refused(self, published):
        ids = [i.replace("ENSG", "ENSMUSG") for i in published["V2"].gene_ids]
        with pytest.raises(DataError, match="wrong dictionary, species"):
            check_coverage(ids, None, published["V2"], "mouse.h5ad")

    def test_mouse_symbols_are_refused_though_upper_cased_they_are_human(self, real_cells, published):
        _, symbols = real_cells["pbmc5k_protein"]
        mouse = [symbol.capitalize() for symbol in symbols]
        assert np.mean(published["V2"].tokens_of(mouse) >= 0) > 0.5  # so coverage alone would let them pass
        with pytest.raises(DataError, match="another species"):
            check_coverage(mouse, None, published["V2"], "mouse.h5ad")
        with pytest.raises(DataError, match="another species"):
            check_coverage([str(i) for i in range(len(mouse))], mouse, published["V2"], "mouse.h5ad")


@pytest.mark.parametrize("specials", [("pad", "mask"), ("pad", "mask", "cls", "eos")], ids=["V1's kind", "V2's kind"])
def test_bionemos_layout_puts_cls_in_front_and_nothing_behind(specials, vocabulary_for, tmp_path):
    vocabulary = vocabulary_for(20, specials=specials)
    bionemo = vocabulary.for_bionemo()
    assert (bionemo.max_length, bionemo.prefix, bionemo.suffix) == (2048, (bionemo.specials["cls"],), ())
    assert bionemo.tokens.tolist() == vocabulary.tokens.tolist()
    assert bionemo.specials["cls"] not in vocabulary.tokens
    tokens, _ = rank_encode(sp.csr_matrix(np.eye(20)[:1]), vocabulary.gene_ids, bionemo)
    assert tokens.tolist() == [bionemo.specials["cls"], int(vocabulary.tokens[0])]
    bionemo.save(tmp_path / "v")
    assert Vocabulary.open(tmp_path / "v").hash == bionemo.hash
