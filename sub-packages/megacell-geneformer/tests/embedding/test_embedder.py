# SPDX-License-Identifier: Apache-2.0
"""An embedding is a cell's own: whatever is embedded beside it, and by plain computation what it says it is."""

import numpy as np
import pytest
import scipy.sparse as sp
import torch

from megacell.core.errors import UsageError
from megacell.geneformer import rank_encode
from megacell.geneformer.embedding import embedder as embed
from megacell.geneformer.embedding.embedder import Embedder
from megacell.geneformer.model.bert import Pack
from megacell.training.distributed import device

GENES = 100


@pytest.fixture(scope="module")
def vocabulary(vocabulary_for):
    return vocabulary_for(genes=GENES, max_length=64)


@pytest.fixture(scope="module")
def model(model_for, vocabulary):
    return model_for(vocabulary)


@pytest.fixture(scope="module")
def counts():
    """30 cells of 1 to 100 genes, so that some are cut at 64 tokens; cells 4 and 17 have none."""
    draw = np.random.default_rng(0)
    matrix = draw.poisson(1.0, size=(30, GENES)) * (draw.random((30, GENES)) < np.linspace(0.05, 1.5, 30)[:, None])
    matrix[:, 0] += 1
    matrix[[4, 17]] = 0
    return sp.csr_matrix(matrix.astype(np.float32))


def embedder(model, pool="mean", layer="second_to_last"):
    return Embedder(model, model.vocabulary.gene_ids, model.vocabulary.symbols, pool, layer)


def states_alone(model, counts, cell):
    """All layers' states [layers + 1, tokens, hidden] of one cell by itself: embedding, each layer, final norm."""
    tokens, bounds = rank_encode(counts[[cell]], model.vocabulary.gene_ids, model.vocabulary, 64)
    none = torch.zeros(0, dtype=torch.int64)
    pack = Pack(
        torch.from_numpy(tokens.astype(np.int64)), torch.arange(len(tokens)),
        torch.from_numpy(bounds.astype(np.int32)), len(tokens), none, none,
    )  # fmt: skip
    kept = []
    hooks = [layer.register_forward_hook(lambda *a: kept.append(a[2][0][:, 0])) for layer in model.bert.encoder.layers]
    with device.single_process(), torch.inference_mode():
        last = model.bert.encode(pack)
    for hook in hooks:
        hook.remove()
    return [state.numpy() for state in (*kept, last)]


def relative(one, other):
    return np.linalg.norm(one - other, axis=-1) / np.linalg.norm(other, axis=-1)


@pytest.fixture(scope="module")
def together(model, counts):
    return embedder(model).embed(counts)


def test_a_cell_alone_has_the_embedding_that_it_has_among_others(model, counts, together):
    vectors, tokens = together
    for cell in range(counts.shape[0]):
        alone, its_tokens = embedder(model).embed(counts[[cell]])
        assert its_tokens == tokens[cell]
        if tokens[cell]:
            assert relative(alone[0], vectors[cell]) <= 1e-6
        else:
            assert np.isnan(alone).all()
            assert np.isnan(vectors[cell]).all()


@pytest.mark.parametrize("pack_tokens", [1, 100, 333], ids=["a cell", "few cells", "some cells"])
def test_the_size_of_a_pack_does_not_matter(pack_tokens, model, counts, together, monkeypatch):
    monkeypatch.setitem(embed.PACK_TOKENS, "cpu", pack_tokens)
    vectors, tokens = embedder(model).embed(counts)
    seen = tokens > 0
    assert np.array_equal(tokens, together[1])
    assert (relative(vectors[seen], together[0][seen]) <= 1e-6).all()
    assert np.isnan(vectors[~seen]).all()


def test_the_order_of_cells_does_not_matter(model, counts, together):
    order = np.random.default_rng(1).permutation(counts.shape[0])
    vectors, tokens = embedder(model).embed(counts[order])
    seen = tokens > 0
    assert np.array_equal(tokens, together[1][order])
    assert (relative(vectors[seen], together[0][order][seen]) <= 1e-6).all()


def test_tokens_are_counted_with_specials_and_cut(counts, together):
    genes = np.diff(counts.indptr)
    assert np.array_equal(together[1], np.where(genes > 0, np.minimum(genes + 2, 64), 0))
    assert (together[1] == 64).any()


@pytest.mark.parametrize(
    ("layer", "number"),
    [("last", -1), ("second_to_last", 1), ("1", 0), (2, 1), ("3", -1)],
    ids=["last", "second to last", "1", "2", "3, behind the final norm"],
)
def test_the_mean_is_that_of_a_layers_gene_states_without_specials(layer, number, model, counts):
    vectors, _ = embedder(model, layer=layer).embed(counts)
    for cell in (0, 9, 29):
        states = states_alone(model, counts, cell)[number]
        assert relative(vectors[cell], states[1:-1].mean(0)) <= 1e-6
        assert relative(vectors[cell], states.mean(0)) > 1e-3  # specials would show


def test_the_state_at_cls_is_the_first_of_the_cell(model, counts):
    vectors, _ = embedder(model, pool="cls").embed(counts)
    for cell in (0, 9, 29):
        assert relative(vectors[cell], states_alone(model, counts, cell)[1][0]) <= 1e-6


def test_layers_differ(model, counts):
    one, two, last = (embedder(model, layer=layer).embed(counts)[0][29] for layer in ("1", "2", "last"))
    assert relative(one, two) > 0.01
    assert relative(two, last) > 0.01


def test_genes_that_the_vocabulary_does_not_know_change_nothing(model, counts, together):
    more = sp.hstack([sp.csr_matrix(np.full((30, 3), 7.0)), counts]).tocsr()
    ids = ["ENSG99999999991", "ENSG99999999992", "unknown", *model.vocabulary.gene_ids]
    vectors, tokens = Embedder(model, ids, [""] * len(ids)).embed(more)
    seen = tokens > 0
    assert np.array_equal(tokens, together[1])
    assert (relative(vectors[seen], together[0][seen]) <= 1e-6).all()


def test_dropout_is_off(model, counts, together):
    again, _ = embedder(model).embed(counts)
    np.testing.assert_array_equal(again, together[0])


@pytest.mark.parametrize("layer", ["0", "4", "-1", "top", "1.5"])
def test_a_layer_that_the_model_has_not_is_refused_with_those_it_has(layer, model):
    with pytest.raises(UsageError, match="last, second_to_last or a number from 1 to 3"):
        embedder(model, layer=layer)


def test_a_model_of_one_layer_has_no_second_to_last(model_for, vocabulary):
    with pytest.raises(UsageError, match="--layer second_to_last: choose last or a number from 1 to 1"):
        embedder(model_for(vocabulary, layers=1))


def test_a_vocabulary_without_cls_has_the_mean_only(model_for, vocabulary_for, counts):
    plain = vocabulary_for(genes=GENES, specials=("pad", "mask"), max_length=64)
    model = model_for(plain)
    with pytest.raises(UsageError, match=r"--pool cls: choose mean$"):
        embedder(model, pool="cls")
    vectors, tokens = embedder(model).embed(counts)
    assert np.array_equal(tokens, np.minimum(np.diff(counts.indptr), 64))
    assert relative(vectors[9], states_alone(model, counts, 9)[1].mean(0)) <= 1e-6
