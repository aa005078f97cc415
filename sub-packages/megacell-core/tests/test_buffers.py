# SPDX-License-Identifier: Apache-2.0
"""Memory that is used again is never used twice at once; the borrowed sort sorts, with and without NumPy's own."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from megacell.core.buffers import SLAB, Pool, WorkingRoom
from megacell.core.vector_sort import sort_address, sort_keys


class TestPool:
    """Memory on loan."""

    @given(sizes=st.lists(st.integers(0, 3000), min_size=2, max_size=30))
    def test_arrays_in_use_never_overlap(self, sizes):
        pool, held = Pool(), []
        for number, size in enumerate(sizes):
            array = pool.empty(size, np.int64)
            array[:] = number
            held.append(array[: size // 2])  # a part of an array keeps all of it
            if number % 3 == 0:
                del held[0]
        first = len(sizes) - len(held)
        assert [set(part.tolist()) <= {number} for number, part in enumerate(held, first)] == [True] * len(held)

    def test_memory_comes_back_when_the_last_array_over_it_is_gone(self):
        pool = Pool()
        array = pool.empty(SLAB, np.uint8)
        place, view = array.ctypes.data, array[5:7]
        del array
        other = pool.empty(SLAB, np.uint8)
        assert other.ctypes.data != place
        del view
        assert pool.empty(SLAB // 2, np.uint16).ctypes.data == place

    def test_an_array_outlives_its_pool(self):
        pool = Pool()
        array = pool.empty(10, np.float32)
        array[:] = 7
        del pool
        assert array.tolist() == [7.0] * 10


def test_working_room_grows_and_keeps_what_was_filled():
    room = WorkingRoom()
    assert room.get("sums", 4, np.float64, fill=0.0).tolist() == [0.0] * 4
    room.get("sums", 4, np.float64)[0] = 3
    assert room.get("sums", 3, np.float64, fill=0.0)[0] == 3
    assert len(room.get("sums", 4000, np.float64)) == 4000
    assert room.get("sums", 2, np.uint8).dtype == np.uint8


@pytest.mark.parametrize("own", [True, False], ids=["numpy's sort", "the compiled sort"])
@given(keys=arrays(np.uint64, st.integers(0, 600)))
def test_keys_are_sorted(own, keys):
    expected = np.sort(keys)
    sort_keys(keys, sort_address() if own else 0)
    assert np.array_equal(keys, expected)


def test_this_numpy_says_where_its_sort_is():
    assert sort_address() != 0
