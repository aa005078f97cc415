# SPDX-License-Identifier: Apache-2.0
"""The whole path on real cells: .h5ad files, store, vocabulary, training, .nemo, embeddings, evaluation."""

import json
import re

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import pytest
import restore
import scipy.sparse as sp
from runs import STEPS, Command, checkpoints, everything_in, fine, here, metrics, one_line

from megacell.core.cli.main import main
from megacell.geneformer import Vocabulary
from megacell.geneformer.interchange.open import open_model
from megacell.geneformer.vocabulary.vocabulary import FILES
from megacell.store import CellStore
from megacell.training.run.metrics import COLUMNS

RUNS = pytest.mark.parametrize(
    "name", ["copies", "halves"], ids=["two data parallel ranks", "two tensor parallel ranks"]
)


# counts


def table(path):
    """Counts (CSR) and gene names of one of the real files, as AnnData reads them."""
    cells = ad.read_h5ad(path)
    matrix, var = (cells.X, cells.var) if cells.raw is None else (cells.raw.X, cells.raw.var)
    return cells, sp.csr_matrix(matrix), np.asarray(var.get("ensembl_id", var.index), object)


@pytest.fixture(scope="module")
def id_of(data):
    """Ids by symbol, where the two files that have both know one only: what the third file's symbols mean."""
    first = ad.read_h5ad(data / "cells" / "pbmc4k_a.h5ad").var
    second = ad.read_h5ad(data / "cells" / "pbmc4k_b.h5ad").raw.var
    symbols = np.concatenate([first["feature_name"].astype(str), second.index.astype(str)])
    pairs = pd.DataFrame({"symbol": symbols, "id": [*first.index, *second["ensembl_id"]]}).drop_duplicates()
    return pairs.drop_duplicates("symbol", keep=False).set_index("symbol")["id"]


@pytest.mark.parametrize("name", ["pbmc4k_a", "pbmc4k_b", "pbmc5k_protein"])
def test_counts_in_the_store_equal_anndatas_cell_by_cell(name, data, store, id_of):
    cells, counts, names = table(data / "cells" / f"{name}.h5ad")
    if name == "pbmc5k_protein":
        names = np.array([id_of.get(symbol, symbol) for symbol in names], object)
    opened = CellStore.open(store)
    number = pd.Series(np.arange(len(opened.gene_ids)), opened.gene_ids)
    rows = np.flatnonzero(opened.obs["source"] == name)
    assert list(opened.obs.index[rows]) == list(cells.obs_names)
    stored = opened.rows(rows)
    for cell in range(cells.n_obs):
        wanted = pd.Series(counts[cell].data, number[names[counts[cell].indices]]).groupby(level=0).sum()
        assert np.array_equal(stored[cell].indices, wanted.index), f"cell {cell}"
        assert np.array_equal(stored[cell].data, wanted), f"cell {cell}"


def test_the_fuller_raw_is_taken_and_antibodies_are_left_out(data, store):
    opened = CellStore.open(store)
    assert {source.name: source.matrix for source in opened.sources} == {
        "pbmc4k_a": "X", "pbmc4k_b": "raw", "pbmc5k_protein": "X",
    }  # fmt: skip
    assert [len(opened.panel(source)) for source in range(3)] == [21_034, 13_558, 16_581]
    antibodies = ad.read_h5ad(data / "cells" / "pbmc5k_protein.h5ad").uns["protein_names"]
    assert not set(antibodies) & {*opened.gene_ids, *opened.symbols}


# training


@RUNS
def test_a_run_leaves_metrics_a_summary_and_whole_checkpoints(name, request, vocabulary):
    run, printed = request.getfixturevalue(name)
    rows, saved = metrics(run), [5, 6, 10, 12]  # every fifth, the best so far at the validation of 6, and the last
    assert tuple(rows[0]) == COLUMNS
    assert [int(row["step"]) for row in rows] == list(range(1, STEPS + 1))
    for row in rows:
        step = int(row["step"])
        absent = {"loss_spike", "grad_norm_spike"} if step == 1 else set()  # there is no step before it
        absent |= {"held_out_loss"} if step % 6 else set()
        absent |= set() if step in saved else {"save_stall"}
        figures = {column: float(row[column]) for column in COLUMNS if row[column]}
        assert figures.keys() == set(COLUMNS) - absent
        assert all(np.isfinite(list(figures.values())))
        assert figures["skipped"] == 0
        assert figures["cells"] == 8
        assert 0 < figures["masked_tokens"] < 0.3 * figures["tokens"]
        assert figures["tokens"] <= 8 * 128
        assert figures["grad_norm"] > 0
        assert 0 <= figures["data_wait"] <= 1
    summary = json.loads((run / "summary.json").read_text())
    assert (summary["step"], summary["finished"]) == (STEPS, True)
    assert {"frequency", "rank_frequency", "masked_genes"} <= summary.keys()
    assert checkpoints(run) == saved
    assert Vocabulary.open(run / "vocabulary").hash == Vocabulary.open(vocabulary).hash
    assert {file.name for file in (run / "vocabulary").iterdir()} == set(FILES)
    assert (vocabulary / "histograms.parquet").is_file()
    assert "split by cell" in printed
    assert f"gene frequency {summary['frequency']:.3f}" in printed


def test_both_kinds_of_parallel_ranks_train_the_same_model(copies, halves):
    one, other = metrics(copies[0]), metrics(halves[0])
    for column in ("loss", "grad_norm", "lr"):
        ours, theirs = ([float(row[column]) for row in rows] for rows in (one, other))
        np.testing.assert_allclose(theirs, ours, rtol=1e-5)
    for column in ("masked_tokens", "tokens"):
        assert [row[column] for row in one] == [row[column] for row in other]


# .nemo


@pytest.fixture(scope="module")
def archives(copies, halves, made):
    """Both runs as .nemo files."""
    paths = [made / f"{run.name}.nemo" for run, _ in (copies, halves)]
    for (run, _), path in zip((copies, halves), paths, strict=True):
        assert main(["export", str(run), "--to", "nemo", "--out", str(path)]) == 0
    return paths


def test_a_nemo_file_restored_in_a_fresh_process_gives_the_runs_logits_bit_for_bit(archives, copies, halves, tmp_path):
    draw = np.random.default_rng(0)
    starts = np.array([0, 3, 60, 188], np.int32)
    none = np.zeros(0, np.int64)
    pack = {
        "tokens": draw.integers(4, 10_000, 188), "positions": np.concatenate([np.arange(n) for n in np.diff(starts)]),
        "cu_seqlens": starts, "masked": none, "labels": none,
    }  # fmt: skip
    np.savez(tmp_path / "pack.npz", **pack)
    script = (restore.__file__,)
    fine(tmp_path / "pack.npz", tmp_path / "logits.npz", *archives, script=script, cwd=tmp_path)
    restored = np.load(tmp_path / "logits.npz")
    for number, (run, _) in enumerate((copies, halves)):
        ours = restore.logits(open_model(run), pack)
        assert restored[f"arr_{number}"].tobytes() == ours.tobytes()
        assert ours[:, :10_000].std() > 0
    assert restored["arr_0"].tobytes() != restored["arr_1"].tobytes()  # sums of two halves differ in the last bits


# embeddings


def test_overlap_asks_a_model_for_the_cells_that_it_was_trained_on(archives, copies, data, tmp_path):
    fine("convert", data / "cells" / "pbmc4k_a.h5ad", "--out", tmp_path / "again")
    of_the_run, of_the_archive, of_no_model = (
        here("overlap", tmp_path / "again", other) for other in (copies[0], archives[0], data / "cells")
    )
    cells = f"{len(CellStore.open(tmp_path / 'again')):,}"
    assert of_the_run[1].splitlines()[-1].split() == ["all", cells, cells]
    assert of_the_archive == of_the_run
    assert of_no_model[0] == 1
    one_line(of_no_model[2], "not a cell store")


@pytest.fixture(scope="module")
def odd_cells(data, store, vocabulary, made):
    """40 cells of the raw layout, shuffled and renamed, with all that a file can hold; two have no known gene."""
    cells = ad.read_h5ad(data / "cells" / "pbmc4k_b.h5ad")
    chosen = np.random.default_rng(1).permutation(cells.n_obs)[:40]
    cells = cells[chosen].copy()
    raw = cells.raw.to_adata()
    counts = raw.X.toarray()
    known = Vocabulary.open(vocabulary).tokens_of(raw.var["ensembl_id"].to_numpy(object)) >= 0
    counts[[7, 12]] = 0
    counts[7, np.flatnonzero(~known)[:5]] = 1
    raw.X = sp.csr_matrix(counts)
    cells.raw = raw
    cells.obs_names = [f"cell {n} of plate ü" for n in range(40)]
    cells.obs["good"] = pd.array([True, None] * 20, dtype="boolean")
    cells.obs["score"] = np.where(np.arange(40) % 3, np.arange(40) / 7, np.nan)
    cells.obs["note"] = pd.array(["a note", None] * 20, dtype="string")
    cells.obsm["X_pca"] = np.random.default_rng(2).normal(size=(40, 5))
    cells.obsp["near"] = sp.random(40, 40, 0.1, format="csr", random_state=3)
    cells.layers["scaled"] = cells.X.copy()
    cells.varm["loadings"] = np.ones((cells.n_vars, 2), np.float32)
    cells.uns["colours"] = {"cell_type": np.array(["red", "blue"], object), "nested": {"number": 3}}
    path = made / "odd.h5ad"
    with ad.settings.override(allow_write_nullable_strings=True):
        cells.write_h5ad(path)
    return path


@pytest.fixture(scope="module")
def embedded(archives, odd_cells, made):
    """What `megacell embed` printed, and the file that it wrote."""
    before = odd_cells.read_bytes()
    out = made / "embedded.h5ad"
    code, printed, errors = here("embed", archives[0], odd_cells, "--out", out)
    assert code == 0, errors
    assert odd_cells.read_bytes() == before
    return printed, out


def objects(path):
    """Every group and dataset of an HDF5 file: its values, or None, and its attributes."""
    found = {}
    with h5py.File(path) as file:

        def look(name, node):
            values = node[()] if isinstance(node, h5py.Dataset) else None
            found[name] = (values, getattr(node, "dtype", None), dict(node.attrs))

        file.visititems(look)
    return found


def test_embedding_a_file_adds_its_keys_and_touches_nothing_else(embedded, odd_cells):
    before, after = objects(odd_cells), objects(embedded[1])
    added = {name for name in after if name not in before}
    ours = r"obsm/X_megacell|obs/megacell_n_tokens|uns/megacell(/\w+)?"
    assert all(re.fullmatch(ours, name) for name in added), sorted(added)
    assert {"obsm/X_megacell", "obs/megacell_n_tokens", "uns/megacell/vocabulary", "uns/megacell/pool"} <= added
    for name, (values, dtype, attributes) in before.items():
        theirs, their_dtype, their_attributes = after[name]
        if name == "obs":
            ordered = their_attributes.pop("column-order")
            assert list(ordered) == [*attributes.pop("column-order"), "megacell_n_tokens"]
        np.testing.assert_equal(theirs, values, err_msg=name)
        np.testing.assert_equal(their_attributes, attributes, err_msg=name)
        assert their_dtype == dtype, name


def test_embeddings_stand_in_the_inputs_order_and_nan_where_no_gene_is_known(embedded, odd_cells):
    printed, out = embedded
    made, given = ad.read_h5ad(out), ad.read_h5ad(odd_cells)
    assert list(made.obs_names) == list(given.obs_names)
    vectors, tokens = made.obsm["X_megacell"], made.obs["megacell_n_tokens"].to_numpy()
    assert vectors.shape == (40, 32)
    assert vectors.dtype == np.float32
    nothing = np.isin(np.arange(40), [7, 12])
    assert np.array_equal(np.isnan(vectors).all(1), nothing)
    assert np.isfinite(vectors[~nothing]).all()
    assert np.array_equal(tokens == 0, nothing)
    assert (tokens[~nothing] > 2).all()
    assert (tokens <= 128).all()
    assert re.search(r"warning: 2 cells have no gene of the vocabulary", printed)


def test_each_row_is_the_embedding_of_that_cell_alone(embedded, odd_cells, archives, tmp_path):
    vectors = ad.read_h5ad(embedded[1]).obsm["X_megacell"]
    cells = ad.read_h5ad(odd_cells)
    reversed_cells = cells[::-1][:25].copy()
    with ad.settings.override(allow_write_nullable_strings=True):
        reversed_cells.write_h5ad(tmp_path / "reversed.h5ad")
    assert main(["embed", str(archives[0]), str(tmp_path / "reversed.h5ad"), "--out", str(tmp_path / "out.npy")]) == 0
    again = np.load(tmp_path / "out.npy", allow_pickle=False)
    np.testing.assert_allclose(again, vectors[::-1][:25], rtol=1e-5, atol=1e-6)


def test_a_table_holds_cell_names_and_a_run_embeds_as_its_nemo_file_does(embedded, odd_cells, copies, tmp_path):
    out = tmp_path / "cells.parquet"
    assert main(["embed", str(copies[0]), str(odd_cells), "--out", str(out)]) == 0
    made, written = pd.read_parquet(out), ad.read_h5ad(embedded[1])
    assert list(made.index) == list(written.obs_names)
    assert list(made.columns) == [*(f"X_megacell_{i}" for i in range(32)), "megacell_n_tokens"]
    np.testing.assert_allclose(made.iloc[:, :32], written.obsm["X_megacell"], rtol=1e-5, atol=1e-6)


def test_the_state_at_cls_is_another_embedding(embedded, odd_cells, archives, tmp_path):
    out = tmp_path / "cls.h5ad"
    words = ["embed", str(archives[0]), str(odd_cells), "--out", str(out), "--pool", "cls", "--layer", "last"]
    assert main(words) == 0
    made, means = ad.read_h5ad(out), ad.read_h5ad(embedded[1]).obsm["X_megacell"]
    vectors = made.obsm["X_megacell"]
    assert (made.uns["megacell"]["pool"], made.uns["megacell"]["layer"]) == ("cls", 2)
    assert np.array_equal(np.isnan(vectors), np.isnan(means))
    # behind the final norm, whose weights have barely moved, a state has mean 0 and variance 1
    np.testing.assert_allclose(np.nanmean(vectors[[0, 1, 2]], axis=1), 0, atol=0.1)
    np.testing.assert_allclose(np.nanstd(vectors[[0, 1, 2]], axis=1), 1, atol=0.1)


def test_a_store_is_embedded_in_its_own_order(archives, store, tmp_path):
    out = tmp_path / "store.h5ad"
    assert main(["embed", str(archives[0]), str(store), "--out", str(out)]) == 0
    made, opened = ad.read_h5ad(out), CellStore.open(store)
    assert list(made.obs_names) == list(opened.obs.index)
    assert made.obsm["X_megacell"].shape == (len(opened), 32)
    assert np.isfinite(made.obsm["X_megacell"]).all()
    assert list(made.obs["source"]) == list(opened.obs["source"])


# evaluation


@RUNS
def test_evaluate_finds_the_held_out_loss_of_training_beside_three_baselines(name, request, store, capsys):
    run, _ = request.getfixturevalue(name)
    words = ["evaluate", str(run), str(store), "--by", "cell_type", "--cells", "24"]
    assert main([*words, "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    everything, groups = rows[0], {row["group"]: row for row in rows[1:]}
    loss = float(metrics(run)[-1]["held_out_loss"])
    assert everything["model"][0] == pytest.approx(loss, rel=1e-5)
    assert everything["masked_genes"] == json.loads((run / "summary.json").read_text())["masked_genes"]
    assert everything["count_arithmetic"][0] < everything["frequency"][0]
    assert groups.keys() <= {"T_CD4", "MNP", "T_CD8", "B", "NK", "(missing)"}
    assert sum(row["cells"] for row in groups.values()) == everything["cells"] == 24
    for predictor in ("model", "frequency", "rank_frequency", "count_arithmetic"):
        share = sum(row[predictor][0] * row["masked_genes"] for row in groups.values()) / everything["masked_genes"]
        assert share == pytest.approx(everything[predictor][0], rel=1e-6)


def test_the_table_names_all_four_predictors_and_a_line_a_group(copies, store, capsys):
    assert main(["evaluate", str(copies[0]), str(store), "--by", "source", "--cells", "24"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "split by cell" in lines[0]
    for title in ("model", "gene frequency", "frequency at that rank", "count arithmetic"):
        assert title in lines[1]
    assert len(lines[2].split("±")) == 5
    assert {line.split()[0] for line in lines[3:]} <= {"pbmc4k_a", "pbmc4k_b", "pbmc5k_protein"}


# a published vocabulary, and the demo's cells


def test_a_model_trains_on_geneformers_second_vocabulary(data, store, tmp_path):
    folder, suffix = data / "geneformer" / "V2", "gc104M.pkl"
    words = ["vocabulary", "import", "--tokens", folder / f"token_dictionary_{suffix}",
             "--medians", folder / f"gene_median_dictionary_{suffix}",
             "--gene-ids", folder / f"ensembl_mapping_dict_{suffix}",
             "--symbols", folder / f"gene_name_id_dict_{suffix}", "--out", tmp_path / "v2"]  # fmt: skip
    assert main(list(map(str, words))) == 0
    settings = [f"store={store}", f"vocabulary={tmp_path / 'v2'}", f"out={tmp_path / 'run'}", "steps=2",
                "batch.cells=4", "model.layers=1", "model.hidden=32", "model.ffn=64", "model.max_length=2048",
                "validation.cells=4", "data.baseline_cells=32", "log_every=1", "logger=csv"]  # fmt: skip
    printed = fine("pretrain", *settings)
    assert "split by donor_id" in printed
    rows = metrics(tmp_path / "run")
    assert [row["step"] for row in rows] == ["1", "2"]
    assert all(np.isfinite(float(row["loss"])) for row in rows)
    assert np.isfinite(float(rows[-1]["held_out_loss"]))
    assert max(int(row["tokens"]) for row in rows) > 4 * 512  # whole cells, not cut as in the other tests
    model = open_model(tmp_path / "run")
    assert model.vocabulary.size == model.sizes.vocabulary_size == 20_275
    assert model.vocabulary.prefix == (model.vocabulary.specials["cls"],)
    assert everything_in(tmp_path / "run" / "vocabulary") == everything_in(tmp_path / "v2")


def test_the_demos_cells_have_the_same_whole_counts_in_all_three_layouts(tmp_path):
    import scanpy as sc

    from megacell.geneformer.demo.demo import write_pbmc

    pbmc = sc.datasets.pbmc68k_reduced()
    shares = np.expm1(pbmc.raw.X.toarray().astype(np.float64))
    smallest = np.where(shares > 0, shares, np.inf).min(axis=1, keepdims=True)
    expected = pd.DataFrame(np.round(shares / smallest), pbmc.obs_names, pbmc.raw.var_names)  # the smallest count is 1
    folder = write_pbmc(tmp_path / "h5ad", "cell_type")
    layouts = {
        "pbmc_1": lambda cells: (cells.X, cells.var_names),
        "pbmc_2": lambda cells: (cells.layers["counts"], cells.var_names),
        "pbmc_3": lambda cells: (cells.raw.X, cells.raw.var_names),
    }
    assert sorted(path.stem for path in folder.iterdir()) == sorted(layouts)
    seen, panels = [], []
    for name, counts_of in layouts.items():
        cells = ad.read_h5ad(folder / f"{name}.h5ad")
        counts, genes = counts_of(cells)
        np.testing.assert_array_equal(counts.toarray(), expected.loc[cells.obs_names, genes])
        assert (cells.X is counts) == (name == "pbmc_1")
        if name != "pbmc_1":
            assert not np.array_equal(cells.X.toarray(), counts.toarray())
        assert list(cells.obs["cell_type"]) == list(pbmc.obs.loc[cells.obs_names, "bulk_labels"])
        seen += list(cells.obs_names)
        panels.append(frozenset(genes))
    assert sorted(seen) == sorted(pbmc.obs_names)
    assert len(set(panels)) == 3
    assert main(["convert", str(folder), "--out", str(tmp_path / "store"), "--allow-subset"]) == 0
    store = CellStore.open(tmp_path / "store")
    assert [source.matrix for source in store.sources] == ["X", "layer:counts", "raw"]
    measured = np.stack([np.isin(store.gene_ids, list(panels[source])) for source in store.source_of])
    wanted = expected.loc[store.obs.index, store.gene_ids].to_numpy() * measured
    np.testing.assert_array_equal(store.rows(slice(None)).toarray(), wanted)


def test_the_command_starts_without_torch(tmp_path):
    look = "import sys; from megacell.core.cli.main import build_parser; build_parser(); print('torch' in sys.modules)"
    code, out, err = Command(script=("-c", look), cwd=tmp_path).end()
    assert (code, out.strip()) == (0, "False"), err
