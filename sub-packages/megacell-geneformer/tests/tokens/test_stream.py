# SPDX-License-Identifier: Apache-2.0
"""Streams of tokens: packed as they say, the same tokens and masks for any number of ranks, in any thread."""

from itertools import pairwise

import numpy as np
import pytest

from megacell.core.errors import DataError, UsageError
from megacell.geneformer.tokens.lengths import token_lengths
from megacell.geneformer.tokens.masking import MaskSettings
from megacell.geneformer.tokens.packing import Packer
from megacell.geneformer.tokens.rank_encoder import RankEncoder, rank_encode
from megacell.geneformer.tokens.stream import token_stream
from megacell.store.sampling.order import Weighted


@pytest.fixture
def store(made_up):
    """200 cells of 60 genes, every twentieth without any."""
    rng = np.random.default_rng(0)
    counts = rng.poisson(0.7, (200, 60)) * rng.integers(1, 9, (200, 60))
    counts[::20] = 0
    return made_up(counts)


@pytest.fixture
def stream(store, vocabulary_for):
    """Make a stream over the 190 cells of the made-up store."""
    vocabulary = vocabulary_for(60, max_length=64)

    def make(**changes):
        given = {"max_length": 40, "global_batch": 16, "token_budget": 150, "multiple_of": 8, "seed": 3, **changes}
        lengths = given.pop("lengths", None)
        lengths = token_lengths(store, vocabulary) if lengths is None else lengths
        cells = given.pop("cells", np.arange(len(store)))
        return token_stream(store, vocabulary, cells, lengths, **given)

    return make


def cells_in(batches):
    """Return what each cell of some micro-batches looks like: number → (tokens, masked places, labels), in order."""
    found = []
    for batch in batches:
        for i, cell in enumerate(batch.cells):
            first, last = batch.cu_seqlens[i], batch.cu_seqlens[i + 1]
            here = (batch.masked >= first) & (batch.masked < last)
            looks = batch.tokens[first:last], batch.masked[here] - first, batch.labels[here]
            found.append((int(cell), *(array.tolist() for array in looks)))
    return found


def test_a_micro_batch_is_laid_out_as_it_says(stream, store, vocabulary_for):
    expected, cu = rank_encode(store.matrix, store.gene_ids, vocabulary_for(60), max_length=40)
    for batch in stream().step(0):
        n = len(batch.cells)
        starts = batch.cu_seqlens
        arrays = (batch.tokens, batch.positions, batch.masked, batch.labels, batch.cells)
        assert [array.dtype for array in arrays] == [np.int32] * 4 + [np.int64]
        assert starts.dtype == np.int32
        assert len(batch.tokens) % 8 == 0
        assert starts[n] == batch.n_tokens <= 150
        assert starts[-1] == len(batch.tokens) < batch.n_tokens + 8
        assert len(starts) == n + 1 + (batch.n_tokens < len(batch.tokens))
        assert batch.max_seqlen == np.diff(starts).max()
        assert (batch.tokens[batch.n_tokens :] == 0).all()
        assert (batch.positions[batch.n_tokens :] == 0).all()
        truth = batch.tokens.copy()
        truth[batch.masked] = batch.labels
        for i, cell in enumerate(batch.cells):
            assert truth[starts[i] : starts[i + 1]].tolist() == expected[cu[cell] : cu[cell + 1]].tolist()
            assert batch.positions[starts[i] : starts[i + 1]].tolist() == list(range(starts[i + 1] - starts[i]))
        assert (np.diff(batch.masked) > 0).all()
        assert (batch.labels > 3).all()


def test_pad_tokens_longer_than_any_cell_count_for_the_longest_sequence(made_up, vocabulary_for):
    store, vocabulary = made_up(np.eye(5)), vocabulary_for(5, max_length=8)
    lengths = token_lengths(store, vocabulary)
    stream = token_stream(
        store, vocabulary, np.arange(5), lengths, max_length=8, global_batch=5, token_budget=64, multiple_of=64, seed=0
    )
    (batch,) = stream.step(0)
    assert (batch.n_tokens, len(batch.tokens), batch.max_seqlen) == (15, 64, 49)


@pytest.mark.parametrize("ranks", [2, 3, 8])
def test_ranks_share_out_the_same_cells_with_the_same_masks(ranks, stream):
    for k in (0, 7, 40):
        alone = sorted(cells_in(stream().step(k)))
        shares = [stream(rank=rank, ranks=ranks).step(k) for rank in range(ranks)]
        assert sorted(cell for share in shares for cell in cells_in(share)) == alone
        assert all(share and all(len(b.cells) for b in share) for share in shares)
        tokens = [sum(b.n_tokens for b in share) for share in shares]
        assert max(tokens) - min(tokens) <= 40


@pytest.mark.parametrize("name", ["pbmc4k_a", "pbmc4k_b"])
def test_ranks_share_out_the_same_real_cells(name, real_store, published):
    cells = np.flatnonzero(np.array([source.name for source in real_store.sources])[real_store.source_of] == name)
    lengths = token_lengths(real_store, published["V2"])

    def cells_at(k, rank, ranks):
        stream = token_stream(
            real_store, published["V2"], cells, lengths,
            max_length=2048, global_batch=64, token_budget=16_384, seed=5, rank=rank, ranks=ranks,
        )  # fmt: skip
        return cells_in(stream.step(k))

    for k in (0, 17):  # the second straddles two epochs
        alone = sorted(cells_at(k, 0, 1))
        assert len({cell for cell, *_ in alone} - set(cells)) == 0
        for ranks in (2, 3, 8):
            assert sorted(cell for rank in range(ranks) for cell in cells_at(k, rank, ranks)) == alone


def test_real_cells_are_what_rank_encode_makes_of_the_file(real_store, real_cells, published):
    counts, ids = real_cells["pbmc4k_a"]
    expected, cu = rank_encode(counts, ids, published["V2"], max_length=2048)
    lengths = token_lengths(real_store, published["V2"])
    assert real_store.sources[0].name == "pbmc4k_a"
    stream = token_stream(
        real_store, published["V2"], np.arange(1100), lengths,
        max_length=2048, global_batch=100, token_budget=32_768, seed=0, masking=MaskSettings(rate=0), validation=True,
    )  # fmt: skip
    found = sorted(cell for k in range(stream.steps_per_epoch) for cell in cells_in(stream.step(k)))
    assert [tokens for _, tokens, _, _ in found] == [expected[a:b].tolist() for a, b in pairwise(cu)]


def test_every_epoch_sees_each_cell_once_with_new_masks(stream):
    seen = [cell for k in range(-(-3 * 190 // 16)) for cell in cells_in(stream().step(k))]
    by_cell = {}
    for number, tokens, *_ in seen:
        by_cell.setdefault(number, []).append(tuple(tokens))
    numbers = [number for number, *_ in seen]
    assert len(set(numbers)) == 190
    counts = np.bincount(numbers)
    assert set(counts[counts > 0]) <= {3, 4}
    differ = [len(set(looks)) > 1 for looks in by_cell.values()]
    assert np.mean(differ) > 0.95


def looks(batches):
    """What a rank's micro-batches hold, byte for byte."""
    arrays = ("tokens", "positions", "cu_seqlens", "masked", "labels", "cells")
    return [[getattr(batch, name).tobytes() for name in arrays] + [batch.n_tokens] for batch in batches]


@pytest.mark.parametrize("ranks", [1, 3])
def test_a_step_is_the_same_for_any_number_of_threads_and_from_any_step_on(ranks, stream):
    last = 16  # into the second epoch of twelve steps
    for rank in range(ranks):
        made = stream(rank=rank, ranks=ranks)
        expected = [looks(made.step(k)) for k in range(last)]
        for threads in (0, 1, 4):
            for first in (0, 5, last - 1):
                with stream(rank=rank, ranks=ranks).prefetched(first, last, threads=threads, depth=2) as ahead:
                    assert [looks(step) for step in ahead] == expected[first:]


def test_validation_is_masked_otherwise_than_training_and_always_alike(stream):
    validation, again = ({c[0]: c for c in cells_in(stream(validation=True, global_batch=190).step(0))} for _ in "ab")
    training = {c[0]: c for c in cells_in(stream(global_batch=190).step(0))}
    assert validation == again
    assert validation.keys() == training.keys()
    assert sum(validation[cell] == training[cell] for cell in training) < 10


def test_a_cell_that_is_drawn_often_is_masked_anew_each_time(stream):
    drawn, seen = stream(order=Weighted(np.arange(190) % 3)), {}
    for k in range(40):
        for cell, tokens, *_ in cells_in(drawn.step(k)):
            seen.setdefault(cell, []).append(tuple(tokens))
    often = [rows for rows in seen.values() if len(rows) > 2 and len(rows[0]) > 20]
    assert len(often) > 50
    assert np.mean([len(set(rows)) / len(rows) for rows in often]) > 0.95


def test_evenness_is_that_of_the_batches(stream):
    imbalance, fill = stream(ranks=4).evenness(3)
    batches = [stream(rank=r, ranks=4).step(3) for r in range(4)]
    tokens = [sum(b.n_tokens for b in share) for share in batches]
    assert imbalance == pytest.approx(max(tokens) / np.mean(tokens) - 1)
    assert fill == pytest.approx(sum(tokens) / sum(len(b.tokens) for share in batches for b in share))


def test_masked_positions_are_counted(stream):
    for batch in stream().step(0):
        assert batch.n_items == len(batch.masked) == len(batch.labels)


def test_masking_settings_reach_the_tokens(stream):
    batches = stream(masking=MaskSettings(rate=1, mask=1, random=0)).step(0)
    for batch in batches:
        genes = batch.tokens[: batch.n_tokens] > 3
        assert not genes.any()
        assert len(batch.masked) == batch.n_tokens - 2 * len(batch.cells)


def test_a_packer_without_keys_masks_nothing(store, vocabulary_for):
    encoder = RankEncoder(store.gene_ids, None, vocabulary_for(60))
    batch = Packer(encoder, MaskSettings()).pack(store.gather(np.arange(1, 5)), np.arange(1, 5))
    assert len(batch.masked) == len(batch.labels) == 0
    expected, cu = rank_encode(store.matrix[1:5], store.gene_ids, vocabulary_for(60))
    assert batch.tokens.tolist() == expected.tolist()
    assert batch.cu_seqlens.tolist() == cu.tolist()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"token_budget": 39}, UsageError, "token_budget 39 does not hold a cell of max_length 40"),
        ({"max_length": 2}, UsageError, "no room"),
        ({"cells": np.array([0, 20])}, DataError, "no cell to train on has a gene that vocabulary made-up knows"),
    ],
    ids=["small budget", "length", "no cells"],
)
def test_what_cannot_work_is_refused_before_the_first_step(change, error, message, stream):
    with pytest.raises(error, match=message):
        stream(**change)


def test_lengths_of_another_vocabulary_are_noticed(stream):
    wrong = np.full(200, 7, np.uint16)
    with pytest.raises(DataError, match=r"step 0, cells \d+, .*: their lengths are not those recorded"):
        stream(lengths=wrong).step(0)
