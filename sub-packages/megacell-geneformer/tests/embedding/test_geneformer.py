# SPDX-License-Identifier: Apache-2.0
"""A model in a notebook's hands: embeddings, genes and attention, from memory, files and stores, in their order."""

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

from megacell.core.errors import DataError, UsageError
from megacell.geneformer import Geneformer, embed_file, rank_encode
from megacell.geneformer.embedding import files as embedding_file
from megacell.geneformer.embedding.embedder import Embedder
from megacell.store import CellStore, convert
from megacell.training.interchange import nemo

GENES, CELLS, EMPTY = 120, 50, 7
GIVEN = {"allow_subset": True}


@pytest.fixture(scope="module")
def model(model_for, vocabulary_for):
    return Geneformer(model_for(vocabulary_for(genes=100), provenance={"step": 3}))


@pytest.fixture(scope="module")
def saved(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "model.nemo"
    nemo.save(model.model, path)
    return path


@pytest.fixture
def cells():
    """50 cells of counts over 120 genes, of which the vocabulary knows 100; one cell has none of those."""
    draw = np.random.default_rng(0)
    counts = draw.poisson(draw.gamma(0.6, 3.0, (CELLS, GENES))).astype(np.float32)
    counts[:, 0] = np.maximum(counts[:, 0], 1)
    counts[EMPTY, :100] = 0
    counts[EMPTY, 100:] = 2
    counts[:, 101] += 1
    var = pd.DataFrame({"symbol": [f"GENE{g}" for g in range(GENES)]}, index=[f"ENSG{g:011d}" for g in range(GENES)])
    return ad.AnnData(sp.csr_matrix(counts), obs=pd.DataFrame(index=[f"cell {i}" for i in range(CELLS)]), var=var)


def close(one, other):
    seen = ~np.isnan(other).any(1)
    assert np.array_equal(seen, ~np.isnan(one).any(1))
    apart = np.linalg.norm(one[seen] - other[seen], axis=1) / np.linalg.norm(other[seen], axis=1)
    assert apart.max() <= 1e-6


def test_cells_come_back_in_their_order_and_in_the_anndata(model, cells):
    with pytest.warns(UserWarning, match=r"1 cells have no gene .* adata\[adata.obs\['megacell_n_tokens'\] > 0\]"):
        embeddings = model.embed(cells, **GIVEN)
    assert embeddings.shape == (CELLS, 32)
    assert np.array_equal(cells.obsm["X_megacell"], embeddings, equal_nan=True)
    assert np.flatnonzero(np.isnan(embeddings).any(1)).tolist() == [EMPTY]
    assert np.flatnonzero(cells.obs["megacell_n_tokens"] == 0).tolist() == [EMPTY]
    backwards = cells[::-1].copy()
    with pytest.warns(UserWarning, match="1 cells"):
        close(model.embed(backwards, **GIVEN)[::-1], embeddings)


@pytest.mark.filterwarnings("ignore:1 cells have no gene")
def test_memory_file_and_store_give_the_same(model, cells, tmp_path):
    path, zarr = tmp_path / "cells.h5ad", tmp_path / "cells.zarr"
    cells.write_h5ad(path)
    cells.write_zarr(zarr)
    convert(path, tmp_path / "store", allow_subset=True)
    expected = model.embed(cells, **GIVEN)
    for given in (path, str(path), zarr, tmp_path / "store", CellStore.open(tmp_path / "store")):
        close(model.embed(given, **GIVEN), expected)


@pytest.mark.filterwarnings("ignore:1 cells have no gene")
def test_a_cells_embedding_is_the_mean_of_its_genes(model, cells):
    genes, embeddings = model.embed(cells, level="gene", **GIVEN), model.embed(cells, **GIVEN)
    assert genes.cells.tolist() == cells.obs_names.tolist()
    means = np.full(embeddings.shape, np.nan, np.float32)
    for i in range(CELLS):
        own = slice(genes.offsets[i], genes.offsets[i + 1])
        inside = genes.gene_ids[own] != ""
        if inside.any():
            means[i] = genes.values[own][inside].mean(0)
    close(means, embeddings)


def test_process_gives_the_tokens_that_rank_encode_gives(model, cells):
    found = model.process(cells, **GIVEN)
    tokens, offsets = rank_encode(cells.X, cells.var_names, model.vocabulary, 64)
    assert np.array_equal(found.tokens, tokens)
    assert np.array_equal(found.offsets, offsets)
    assert found.gene_ids[1] in set(cells.var_names)
    assert found.gene_ids[0] == ""


def test_a_notebook_shows_what_it_holds(model, cells):
    assert repr(model) == "Geneformer(3 layers x 32, pre-LN, made-up: 100 genes, cells of up to 64 tokens)"
    processed = model.process(cells, **GIVEN)
    assert repr(processed) == f"TokenizedCells(50 cells, {len(processed.tokens):,} tokens)"


def test_attention_of_each_cell_sums_to_one_over_its_own_tokens(model, cells):
    found = list(model.attention(cells, layer=2, **GIVEN))
    assert [name for name, _, _ in found] == [name for i, name in enumerate(cells.obs_names) if i != EMPTY]
    lengths = np.diff(model.process(cells, **GIVEN).offsets)
    for (_, genes, weights), length in zip(found, lengths[lengths > 0], strict=True):
        assert weights.shape == (4, length, length)
        assert len(genes) == length
        np.testing.assert_allclose(weights.sum(-1), 1, rtol=1e-5)


def test_what_is_no_count_is_refused_in_memory_too(model, cells):
    normalised = cells.copy()
    normalised.X = sp.csr_matrix(np.log1p(normalised.X.toarray() / normalised.X.sum(1) * 1e4))
    with pytest.raises(DataError, match="no counts"):
        model.embed(normalised, **GIVEN)
    with pytest.raises(DataError, match="a selection"):
        model.embed(cells)


def test_an_unknown_level_is_refused(model, cells):
    with pytest.raises(UsageError, match="cell, gene"):
        model.embed(cells, level="donor")


# -- files


@pytest.fixture
def written(cells, tmp_path, monkeypatch):
    path = tmp_path / "cells.h5ad"
    cells.write_h5ad(path)
    monkeypatch.setattr("megacell.geneformer.embedding.inputs.ROWS_AT_ONCE", 8)
    return path


@pytest.mark.parametrize("suffix", [".h5ad", ".npy", ".parquet"])
@pytest.mark.filterwarnings("ignore:1 cells have no gene")
def test_a_file_that_was_stopped_goes_on_and_is_the_same(suffix, model, saved, cells, written, tmp_path, monkeypatch):
    out, real, calls = tmp_path / f"out{suffix}", Embedder.embed, []

    def dying(self, rows):
        calls.append(rows.shape[0])
        if len(calls) == 4:
            raise KeyboardInterrupt
        return real(self, rows)

    monkeypatch.setattr(Embedder, "embed", dying)
    with pytest.raises(KeyboardInterrupt):
        embed_file(saved, written, out, **GIVEN)
    assert not out.exists()
    lines = embed_file(saved, written, out, **GIVEN)
    assert lines[0] == "going on: 24 of 50 cells were there"
    assert sum(calls) == CELLS + 8  # the block that died was computed again, and no other
    found = {
        ".h5ad": lambda: ad.read_h5ad(out).obsm["X_megacell"],
        ".npy": lambda: np.load(out),
        ".parquet": lambda: pd.read_parquet(out).drop(columns="megacell_n_tokens").to_numpy(),
    }[suffix]()
    monkeypatch.setattr(Embedder, "embed", real)
    close(found, model.embed(cells, **GIVEN))
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(["cells.h5ad", out.name])


def test_unfinished_work_of_another_request_is_not_gone_on_with(saved, written, tmp_path, monkeypatch):
    out = tmp_path / "out.npy"
    with monkeypatch.context() as patch:
        patch.setattr(embedding_file, "_write", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            embed_file(saved, written, out, **GIVEN)
    lines = embed_file(saved, written, out, layer="last", **GIVEN)
    assert "going on" not in lines[0]


def test_two_ranks_share_the_cells(model, saved, cells, written, tmp_path, monkeypatch):
    out = tmp_path / "out.npy"
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "test")
    monkeypatch.setenv("WORLD_SIZE", "2")
    # one after the other here: the first rank begins the work and would wait, so its part is let be done at once
    for rank, wait in (("0", False), ("1", False), ("0", True)):
        monkeypatch.setenv("RANK", rank)
        with monkeypatch.context() as patch:
            if rank == "0" and not wait:
                patch.setattr(embedding_file.Unfinished, "wait", lambda self: (_ for _ in ()).throw(KeyboardInterrupt))
                with pytest.raises(KeyboardInterrupt):
                    embed_file(saved, written, out, **GIVEN)
            else:
                lines = embed_file(saved, written, out, **GIVEN)
                assert bool(lines) == wait
    monkeypatch.delenv("TORCHELASTIC_RUN_ID")
    with pytest.warns(UserWarning, match="1 cells"):
        close(np.load(out), model.embed(cells, **GIVEN))
