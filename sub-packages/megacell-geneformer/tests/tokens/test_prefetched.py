# SPDX-License-Identifier: Apache-2.0
"""Steps made ahead: the same for any number of threads and ranks and from any step on; no thread outlives its use."""

import signal
import threading
import time

import numpy as np
import pytest

from megacell.core.errors import DataError, UsageError
from megacell.geneformer.tokens.lengths import token_lengths
from megacell.store.sampling.batch_stream import BatchStream
from megacell.store.sampling.order import BlockShuffled, Shuffled, Weighted
from megacell.store.sampling.prefetched import NAME, Prefetched

THREADS = (0, 1, 4)


def running():
    """Names of the loader's threads that run now."""
    return [thread.name for thread in threading.enumerate() if thread.name.startswith(NAME)]


def looks(batches):
    """What a rank's micro-batches hold, bytes for bytes."""
    arrays = ("tokens", "positions", "cu_seqlens", "masked", "labels", "cells")
    return [[getattr(batch, name).tobytes() for name in arrays] + [batch.n_tokens] for batch in batches]


@pytest.fixture
def stream(made_up, vocabulary_for):
    """Make a stream over 200 cells of 60 genes."""
    rng = np.random.default_rng(0)
    store, vocabulary = made_up(rng.poisson(0.7, (200, 60)) + np.eye(200, 60)), vocabulary_for(60)
    lengths = token_lengths(store, vocabulary)
    cells = np.flatnonzero(lengths)

    def make(order=None, **changes):
        given = {"max_length": 40, "global_batch": 16, "token_budget": 150, "seed": 3, **changes}
        if order is Weighted:
            given["order"] = Weighted(cells % 3)
        elif order is not None:
            given["order"] = order
        return BatchStream(store, vocabulary, cells, lengths, **given)

    return make


@pytest.mark.parametrize("order", [Shuffled(), BlockShuffled(8, 4), Weighted], ids=["shuffled", "blocks", "weighted"])
@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
def test_a_step_is_the_same_for_any_number_of_threads_and_from_any_step_on(ranks, order, stream):
    last = 16  # into the second epoch of twelve or thirteen steps
    for rank in range(ranks):
        made = stream(order, rank=rank, ranks=ranks)
        expected = [looks(made.step(k)) for k in range(last)]
        for threads in THREADS:
            for first in (0, 5, last - 1, last):
                with stream(order, rank=rank, ranks=ranks).prefetched(first, last, threads=threads, depth=2) as ahead:
                    assert [looks(step) for step in ahead] == expected[first:]


@pytest.mark.parametrize("order", [Shuffled(), BlockShuffled(8, 4), Weighted], ids=["shuffled", "blocks", "weighted"])
def test_the_cells_of_a_step_and_their_masks_are_the_same_for_any_number_of_ranks(order, stream):
    def cells_of(k, ranks):
        found = []
        for rank in range(ranks):
            for batch in stream(order, rank=rank, ranks=ranks).step(k):
                for i, cell in enumerate(batch.cells.tolist()):
                    first, last = batch.cu_seqlens[i : i + 2]
                    here = (batch.masked >= first) & (batch.masked < last)
                    found.append((cell, batch.tokens[first:last].tolist(), batch.labels[here].tolist()))
        return sorted(found)

    for k in (0, 3, 12, 40):
        alone = cells_of(k, 1)
        assert len(alone) == 16
        for ranks in (2, 3, 8):
            assert cells_of(k, ranks) == alone


def test_a_cell_that_is_drawn_often_is_masked_anew_each_time(stream):
    drawn, seen = stream(Weighted), {}
    for k in range(40):
        for batch in drawn.step(k):
            for i, cell in enumerate(batch.cells.tolist()):
                row = batch.tokens[batch.cu_seqlens[i] : batch.cu_seqlens[i + 1]]
                seen.setdefault(cell, []).append(tuple(row.tolist()))
    often = [rows for rows in seen.values() if len(rows) > 2 and len(rows[0]) > 20]
    assert len(often) > 50
    assert np.mean([len(set(rows)) / len(rows) for rows in often]) > 0.95


@pytest.mark.parametrize("threads", THREADS)
class TestEveryEnd:
    """However the loader ends, its threads end with it."""

    def test_the_last_step(self, threads):
        assert list(Prefetched(str, 3, 20, threads=threads, depth=2)) == list(map(str, range(3, 20)))
        assert not running()

    def test_closing_on_the_way(self, threads):
        ahead = Prefetched(str, 0, None, threads=threads, depth=2)
        assert next(ahead) == "0"
        assert bool(running()) == (threads > 0)
        ahead.close()
        assert not running()
        ahead.close()  # again does no harm
        assert list(ahead) == []

    @pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
    def test_an_error_in_the_consumer(self, error, threads):
        def consume():
            with Prefetched(str, 0, None, threads=threads, depth=2) as ahead:
                next(ahead)
                raise error

        with pytest.raises(error):
            consume()
        assert not running()

    def test_ctrl_c_while_it_waits(self, threads, request):
        before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it
        request.addfinalizer(lambda: signal.signal(signal.SIGINT, before))

        def consume():
            with Prefetched(lambda step: time.sleep(0.2), 0, 100, threads=threads, depth=1) as ahead:
                main = threading.main_thread().ident
                threading.Timer(0.05, lambda: signal.pthread_kill(main, signal.SIGINT)).start()
                list(ahead)

        with pytest.raises(KeyboardInterrupt):
            consume()
        assert not running()

    def test_an_error_in_a_step_comes_at_its_turn(self, threads):
        def fails_at_4(step):
            if step == 4:
                raise DataError("cell 17")
            return step

        ahead = Prefetched(fails_at_4, 0, 10, threads=threads, depth=3)
        assert [next(ahead) for _ in range(4)] == [0, 1, 2, 3]
        with pytest.raises(DataError, match="cell 17"):
            next(ahead)
        assert not running()
        assert list(ahead) == []


@pytest.mark.parametrize("threads", THREADS)
def test_an_unreadable_cell_is_named_in_the_trainer(threads, stream, monkeypatch):
    working = stream()
    poisoned = int(working.step(2)[1].cells[0])
    gather = working.store.gather

    def fail(cells, **_):
        if poisoned in cells:
            raise OSError("unreadable page")
        return gather(cells)

    monkeypatch.setattr(working.store, "gather", fail)
    ahead = working.prefetched(2, 3, threads=threads, depth=2)
    with pytest.raises(DataError, match=rf"step 2, cells {poisoned}: unreadable page"):
        next(ahead)
    assert not running()


@pytest.mark.parametrize("threads", THREADS)
def test_as_many_steps_are_made_ahead_as_asked_for(threads):
    made = []
    with Prefetched(made.append, 0, None, threads=threads, depth=3) as ahead:
        deadline = time.monotonic() + 30
        while len(made) < 3 * threads and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.05)
        assert sorted(made) == list(range(3 * threads))
        next(ahead)
    assert max(made, default=0) <= 3 * threads + 1


@pytest.mark.parametrize("threads", THREADS)
def test_waiting_is_measured(threads):
    def slow(step):
        time.sleep(0.05)
        return step

    with Prefetched(slow, 0, 4, threads=threads, depth=1) as ahead:
        assert ahead.wait_seconds == 0
        next(ahead)
        assert ahead.wait_seconds > 0.03
        time.sleep(0.3)  # a consumer slower than the threads does not wait for them
        before = ahead.wait_seconds
        next(ahead)
        assert (ahead.wait_seconds - before > 0.03) == (threads == 0)


@pytest.mark.parametrize("wrong", [{"threads": -1, "depth": 1}, {"threads": 1, "depth": 0}], ids=str)
def test_a_number_that_cannot_be_meant_is_refused(wrong):
    with pytest.raises(UsageError, match="threads that prefetch"):
        Prefetched(str, 0, None, **wrong)
