# SPDX-License-Identifier: Apache-2.0
"""Batches: packed as they say, the same cells and tokens for any number of ranks, at any step, in any thread."""

from itertools import pairwise

import numpy as np
import pytest

from megacell.core.errors import DataError, UsageError
from megacell.geneformer.tokens.lengths import token_lengths
from megacell.geneformer.tokens.masking import MaskSettings
from megacell.geneformer.tokens.packing import Packer
from megacell.geneformer.tokens.rank_encoder import RankEncoder, rank_encode
from megacell.store.sampling.batch_stream import BatchStream


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
        return BatchStream(store, vocabulary, cells, lengths, **given)

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
    stream = BatchStream(
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
        stream = BatchStream(
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
    stream = BatchStream(
        real_store, published["V2"], np.arange(1100), lengths,
        max_length=2048, global_batch=100, token_budget=32_768, seed=0, masking=MaskSettings(rate=0), validation=True,
    )  # fmt: skip
    found = sorted(cell for k in range(stream.steps_per_epoch) for cell in cells_in(stream.step(k)))
    assert [tokens for _, tokens, _, _ in found] == [expected[a:b].tolist() for a, b in pairwise(cu)]


def test_a_step_is_the_same_whenever_and_wherever_it_is_made(stream):
    first = stream()
    in_a_row = [cells_in(first.step(k)) for k in range(30)]
    assert [cells_in(stream().step(k)) for k in reversed(range(30))] == in_a_row[::-1]
    with stream().prefetched(12, 30, threads=1, depth=2) as ahead:
        assert [cells_in(batches) for batches in ahead] == in_a_row[12:]


def test_the_token_budget_changes_the_packs_and_nothing_else(stream):
    assert sorted(cells_in(stream(token_budget=1000).step(3))) == sorted(cells_in(stream().step(3)))
    assert len(stream(token_budget=1000).step(3)) == 1
    parts = stream().step(3)
    tokens = sum(b.n_tokens for b in parts)
    assert -(-tokens // 150) <= len(parts) <= -(-tokens // 150) + 2


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


def test_steps_of_an_epoch_are_rounded_up(stream):
    assert stream().steps_per_epoch == 12
    assert stream(global_batch=190).steps_per_epoch == 1


def test_cells_without_a_known_gene_are_passed_over_and_counted(stream):
    assert stream().skipped == 10
    assert len(stream().cells) == 190


def test_a_batch_larger_than_the_epoch_holds_cells_of_several(stream):
    found = cells_in(stream(cells=np.arange(1, 6), global_batch=12, token_budget=64).step(0))
    assert sorted(np.bincount([cell for cell, *_ in found], minlength=6)[1:]) == [2, 2, 2, 3, 3]


class TestValidation:
    """Validation sees the same cells with the same masks every time."""

    def test_cells_come_in_their_own_order_and_the_last_batch_is_short(self, stream):
        validation = stream(validation=True, cells=np.arange(50, 90), token_budget=1000)
        steps = [cells_in(validation.step(k)) for k in range(validation.steps_per_epoch)]
        assert [len(step) for step in steps] == [16, 16, 6]
        assert [cell for step in steps for cell, *_ in step] == [c for c in range(50, 90) if c % 20]
        with pytest.raises(UsageError, match="step 3"):
            validation.step(3)

    def test_its_masks_are_not_those_of_training(self, stream):
        validation = {c[0]: c for c in cells_in(stream(validation=True, global_batch=190).step(0))}
        training = {c[0]: c for c in cells_in(stream(global_batch=190).step(0))}
        assert validation.keys() == training.keys()
        same = sum(validation[cell] == training[cell] for cell in training)
        assert same < 10

    def test_more_ranks_than_cells_leave_a_rank_without(self, stream):
        shares = [stream(validation=True, cells=np.arange(1, 4), rank=r, ranks=4).step(0) for r in range(4)]
        assert sorted(len(share) for share in shares) == [0, 1, 1, 1]

    def test_prefetching_ends_with_the_cells(self, stream):
        with stream(validation=True).prefetched(0, threads=1, depth=2) as ahead:
            assert len(list(ahead)) == 12


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
        ({"ranks": 17}, UsageError, "global_batch 16 is smaller than the number of data-parallel ranks 17"),
        ({"token_budget": 39}, UsageError, "token_budget 39 does not hold a cell of max_length 40"),
        ({"rank": 2, "ranks": 2}, UsageError, "rank 2"),
        ({"max_length": 2}, UsageError, "no room"),
        ({"seed": -1}, UsageError, "seed"),
        ({"cells": np.array([0, 20])}, DataError, "no cell to train on"),
        ({"lengths": np.ones(7, np.uint16)}, DataError, "7 token lengths for 200 cells"),
    ],
    ids=["more ranks than cells", "small budget", "rank", "length", "seed", "no cells", "lengths"],
)
def test_what_cannot_work_is_refused_before_the_first_step(change, error, message, stream):
    with pytest.raises(error, match=message):
        stream(**change)


def test_lengths_of_another_vocabulary_are_noticed(stream):
    wrong = np.full(200, 7, np.uint16)
    with pytest.raises(DataError, match=r"step 0, cells \d+, .*: their lengths are not those recorded"):
        stream(lengths=wrong).step(0)
