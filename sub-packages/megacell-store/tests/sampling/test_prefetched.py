# SPDX-License-Identifier: Apache-2.0
"""Steps made ahead: in order, as many as were asked for, errors at their turn; no thread outlives its use."""

import signal
import threading
import time

import pytest

from megacell.core.errors import DataError, UsageError
from megacell.store.sampling.prefetched import NAME, Prefetched

THREADS = (0, 1, 4)


def running():
    """Names of the loader's threads that run now."""
    return [thread.name for thread in threading.enumerate() if thread.name.startswith(NAME)]


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
