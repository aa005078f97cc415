# SPDX-License-Identifier: Apache-2.0
"""Batches from a tokenised corpus: those of the store it was made from, and refusals of what does not fit."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megacell.core.errors import DataError
from megacell.geneformer.tokens.lengths import token_lengths
from megacell.geneformer.tokens.stream import token_stream
from megacell.geneformer.tokens.token_dataset import TokenFolder, open_cells
from megacell.geneformer.tokens.tokenize import tokenize
from megacell.store.sampling.split import SplitSettings, split_cells


def write(folder, rows, kind=None):
    """Write rows of tokens as `datasets` would."""
    folder.mkdir()
    table = pa.table({"input_ids": pa.array(rows, kind or pa.list_(pa.int64()))})
    with pa.OSFile(str(folder / "data.arrow"), "wb") as file, pa.ipc.new_stream(file, table.schema) as stream:
        stream.write_table(table, max_chunksize=3)
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": "data.arrow"}]}))
    return folder


@pytest.fixture
def store(made_up):
    """120 cells of 20 genes by six donors; every tenth cell empty."""
    counts = np.random.default_rng(0).poisson(1.0, (120, 20)) + 1
    counts[::10] = 0
    return made_up(counts, donors=[f"d{i % 6}" for i in range(120)])


@pytest.mark.parametrize("max_length", [22, 9], ids=["whole cells", "cells cut shorter than in the corpus"])
@pytest.mark.parametrize("specials", [("pad", "mask"), ("pad", "mask", "cls"), ("pad", "mask", "cls", "eos")], ids=str)
def test_batches_are_those_of_the_store_but_for_the_cells_numbers(
    specials, max_length, store, vocabulary_for, tmp_path
):
    vocabulary = vocabulary_for(20, specials=specials)
    tokenize(store, vocabulary, tmp_path / "corpus", cells_a_file=50)
    corpus = open_cells(tmp_path / "corpus", vocabulary)
    numbers = np.asarray(corpus.obs_slice()["cell"])
    settings = {"max_length": max_length, "global_batch": 16, "token_budget": 200, "seed": 4, "validation": True}
    streams = [
        token_stream(source, vocabulary, cells, token_lengths(source, vocabulary), **settings)
        for source, cells in ((store, numbers), (corpus, np.arange(len(corpus))))
    ]
    assert streams[1].steps_per_epoch == streams[0].steps_per_epoch
    for k in range(streams[0].steps_per_epoch):
        for ours, theirs in zip(*(stream.step(k) for stream in streams), strict=True):
            truths = []
            for batch in (ours, theirs):
                truth = batch.tokens.copy()
                truth[batch.masked] = batch.labels
                truths.append(truth.tolist())
            assert truths[0] == truths[1]
            assert ours.cu_seqlens.tolist() == theirs.cu_seqlens.tolist()
            assert ours.cells.tolist() == numbers[theirs.cells].tolist()


def test_published_cells_of_genecorpus_make_batches_as_they_stand(data, published, tmp_path):
    rows = pq.read_table(data / "geneformer" / "genecorpus_500_cells.parquet")["input_ids"].to_pylist()
    corpus = TokenFolder.open(write(tmp_path / "genecorpus", rows), published["V1"])
    stream = token_stream(
        corpus, published["V1"], np.arange(500), token_lengths(corpus, published["V1"]),
        max_length=2048, global_batch=50, token_budget=16_384, seed=0, validation=True,
    )  # fmt: skip
    for batch in stream.step(0):
        truth = batch.tokens.copy()
        truth[batch.masked] = batch.labels
        for i, cell in enumerate(batch.cells.tolist()):
            assert truth[batch.cu_seqlens[i] : batch.cu_seqlens[i + 1]].tolist() == rows[cell][:2048]
    with pytest.raises(DataError, match="another dictionary"):
        TokenFolder.open(tmp_path / "genecorpus", published["V2"])


def test_a_corpus_is_split_by_its_own_columns_or_by_its_cells(store, vocabulary_for, tmp_path):
    vocabulary = vocabulary_for(20)
    tokenize(store, vocabulary, tmp_path / "corpus")
    corpus = TokenFolder.open(tmp_path / "corpus", vocabulary)
    split = split_cells(corpus, SplitSettings(holdout=0.2))
    assert split.by == "donor_id"
    donors = corpus.obs_slice(["donor_id"])["donor_id"].to_numpy()
    assert not set(donors[split.train]) & set(donors[split.validation])
    plain = TokenFolder.open(write(tmp_path / "plain", [[2, g, 3] for g in range(4, 24)] * 2), vocabulary)
    split = split_cells(plain, SplitSettings(holdout=0.3))
    assert split.by == "cell"
    assert split.validation[:20].tolist() == split.validation[20:].tolist()  # equal cells fall on one side


def test_large_lists_are_read_too(vocabulary_for, tmp_path):
    rows = [[2, 4, 5, 3], [2, 9, 3]] * 4
    corpus = TokenFolder.open(write(tmp_path / "c", rows, pa.large_list(pa.int32())), vocabulary_for(20))
    indptr, tokens, _ = corpus.gather(np.array([7, 0, 7]))
    assert indptr.tolist() == [0, 3, 7, 10]
    assert tokens.tolist() == [2, 9, 3, 2, 4, 5, 3, 2, 9, 3]
    with pytest.raises(DataError, match="outside its 8"):
        corpus.gather(np.array([8]))


@pytest.mark.parametrize(
    ("rows", "specials"),
    [
        ([[2, 4, 99, 3]], ("pad", "mask", "cls", "eos")),
        ([[4, 5, 3]], ("pad", "mask", "cls", "eos")),
        ([[2, 4, 5]], ("pad", "mask", "cls", "eos")),
        ([[3, 1, 5]], ("pad", "mask")),
    ],
    ids=["a token beyond the vocabulary", "no cls", "no eos", "a special where there is none"],
)
def test_a_corpus_of_another_dictionary_is_refused(rows, specials, vocabulary_for, tmp_path):
    with pytest.raises(DataError, match="another dictionary"):
        TokenFolder.open(write(tmp_path / "c", rows), vocabulary_for(20, specials=specials))


def test_a_broken_directory_is_refused(vocabulary_for, tmp_path):
    folder = write(tmp_path / "c", [[2, 4, 3]])
    (folder / "data.arrow").write_bytes((folder / "data.arrow").read_bytes()[:50])
    with pytest.raises(DataError, match="broken"):
        TokenFolder.open(folder, vocabulary_for(20))
    (tmp_path / "d").mkdir()
    other = write(tmp_path / "d" / "e", [[2.5]], pa.list_(pa.float64()))
    with pytest.raises(DataError, match="not lists of whole numbers"):
        TokenFolder.open(other, vocabulary_for(20))
