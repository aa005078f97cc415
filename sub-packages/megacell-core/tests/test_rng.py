# SPDX-License-Identifier: Apache-2.0
"""The generator against Random123's known answers and against a reference written from the paper."""

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from reference_philox import KNOWN_ANSWERS, reference_philox

from megacell.core.errors import UsageError
from megacell.core.rng import ORDER, TRAINING, VALIDATION, philox_words, stream_key

words = st.integers(0, 2**32 - 1)


def ours(counter, key) -> tuple[int, ...]:
    return tuple(philox_words(np.array(counter, np.uint32), np.array(key, np.uint32)).tolist())


@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN_ANSWERS.values(), ids=KNOWN_ANSWERS.keys())
def test_philox_gives_the_known_answers_of_random123(counter, key, answer):
    assert ours(counter, key) == answer
    assert reference_philox(counter, key) == answer


@given(counter=st.tuples(words, words, words, words), key=st.tuples(words, words))
def test_philox_is_the_reference(counter, key):
    assert ours(counter, key) == reference_philox(counter, key)


@given(
    seed=st.integers(0, 2**64 - 1),
    epoch=st.integers(0, 2**64 - 1),
    stream=st.sampled_from([TRAINING, VALIDATION, ORDER]),
)
def test_a_streams_key_is_philox_of_epoch_and_stream_under_the_seed(seed, epoch, stream):
    counter = (epoch & 0xFFFFFFFF, epoch >> 32, stream, 0)
    expected = reference_philox(counter, (seed & 0xFFFFFFFF, seed >> 32))[:2]
    key = stream_key(seed, epoch, stream)
    assert key.dtype == np.uint32
    assert tuple(key.tolist()) == expected


def test_seed_epoch_and_stream_each_change_the_key():
    given = [(0, 0, TRAINING), (1, 0, TRAINING), (2**32, 0, TRAINING), (0, 1, TRAINING), (0, 2**32, TRAINING),
             (0, 0, VALIDATION), (0, 0, ORDER)]  # fmt: skip
    keys = [stream_key(*each).tolist() for each in given]
    assert all(one != other for one, other in combinations(keys, 2))


def test_a_key_that_is_changed_changes_no_other():
    expected = stream_key(5, 0, TRAINING).tolist()
    stream_key(5, 0, TRAINING)[:] = 0
    assert stream_key(5, 0, TRAINING).tolist() == expected


@pytest.mark.parametrize("seed", [-1, 2**64])
def test_a_seed_beyond_64_bits_is_refused(seed):
    with pytest.raises(UsageError, match="seed"):
        stream_key(seed, 0, TRAINING)
