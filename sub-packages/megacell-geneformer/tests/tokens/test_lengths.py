# SPDX-License-Identifier: Apache-2.0
"""Token lengths: counted as cells are encoded, kept for a store and a vocabulary, never believed when broken."""

import numpy as np
import pytest

from megacell.geneformer.tokens import lengths as module
from megacell.geneformer.tokens.lengths import token_lengths
from megacell.geneformer.tokens.rank_encoder import RankEncoder, rank_encode


@pytest.mark.parametrize("edition", ["V1", "V2"])
def test_lengths_of_real_cells_are_those_of_their_encoding(edition, real_store, published):
    vocabulary = published[edition]
    _, cu = rank_encode(real_store.rows(slice(None)), real_store.gene_ids, vocabulary, 60_000, real_store.symbols)
    found = token_lengths(real_store, vocabulary)
    assert found.dtype == np.uint16
    around = len(vocabulary.prefix) + len(vocabulary.suffix)
    assert found.tolist() == (np.diff(cu) - around).tolist()


def test_genes_that_share_a_token_count_once(made_up, vocabulary_for):
    ids = ["ENSG00000000001", "ENSG00000000001.2", "unheard-of", "ENSG00000000002"]
    store = made_up([[1, 1, 1, 1], [1, 0, 0, 1], [0, 2, 5, 0], [0, 0, 5, 0]], ids)
    assert token_lengths(store, vocabulary_for()).tolist() == [2, 2, 1, 0]


def test_lengths_become_inputs_with_specials_and_cut(vocabulary_for):
    encoder = RankEncoder(["a"], None, vocabulary_for(), max_length=10)
    assert encoder.input_lengths(np.array([0, 1, 8, 9, 65_535], np.uint16)).tolist() == [0, 3, 10, 10, 10]


@pytest.fixture
def counted(monkeypatch):
    """How often lengths were counted."""
    calls = []
    count = module._count
    monkeypatch.setattr(module, "_count", lambda *given: calls.append(given) or count(*given))
    return calls


@pytest.fixture
def store(made_up):
    return made_up(np.ones((50, 20)))


def test_they_are_counted_once_then_mapped(store, vocabulary_for, counted, cache):
    first = token_lengths(store, vocabulary_for())
    second = token_lengths(store, vocabulary_for())
    assert len(counted) == 1
    assert isinstance(second, np.memmap)
    assert first.tolist() == second.tolist() == [20] * 50
    assert len(list((cache / "lengths").iterdir())) == 1  # nothing temporary is left


def test_another_store_or_vocabulary_is_counted_anew(store, made_up, vocabulary_for, counted):
    token_lengths(store, vocabulary_for())
    token_lengths(made_up(2 * np.ones((50, 20))), vocabulary_for())
    token_lengths(store, vocabulary_for(name="another"))
    assert len(counted) == 3


@pytest.mark.parametrize("content", [b"", b"nonsense"], ids=["empty", "nonsense"])
def test_a_broken_cache_is_counted_anew(content, store, vocabulary_for, cache):
    token_lengths(store, vocabulary_for())
    (file,) = (cache / "lengths").iterdir()
    file.write_bytes(content)
    assert token_lengths(store, vocabulary_for()).tolist() == [20] * 50
