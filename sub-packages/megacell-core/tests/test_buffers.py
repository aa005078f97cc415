# SPDX-License-Identifier: Apache-2.0
"""Memory that is used again is never used twice at once; keys are sorted with and without NumPy's own sort."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from megacell.core.buffers import SLAB, Pool, Workspace
from megacell.core.vector_sort import sort_address, sort_keys


class TestPool:
    """Memory on loan."""

    @given(sizes=st.lists(st.integers(0, 3000), min_size=2, max_size=30))
    def test_arrays_in_use_never_overlap(self, sizes):
        pool, held = Pool(), []
        for number, size in enumerate(sizes):
            array = pool.allocate(size, np.int64)
            array[:] = number
            held.append(array[: size // 2])  # a part of an array keeps all of it
            if number % 3 == 0:
                del held[0]
        first = len(sizes) - len(held)
        assert [set(part.tolist()) <= {number} for number, part in enumerate(held, first)] == [True] * len(held)

    def test_memory_comes_back_when_the_last_array_over_it_is_gone(self):
        pool = Pool()
        array = pool.allocate(SLAB, np.uint8)
        place, view = array.ctypes.data, array[5:7]
        del array
        other = pool.allocate(SLAB, np.uint8)
        assert other.ctypes.data != place
        del view
        assert pool.allocate(SLAB // 2, np.uint16).ctypes.data == place

    def test_an_array_outlives_its_pool(self):
        pool = Pool()
        array = pool.allocate(10, np.float32)
        array[:] = 7
        del pool
        assert array.tolist() == [7.0] * 10


def test_a_workspace_grows_and_keeps_what_was_filled():
    work = Workspace()
    assert work.get("sums", 4, np.float64, fill=0.0).tolist() == [0.0] * 4
    work.get("sums", 4, np.float64)[0] = 3
    assert work.get("sums", 3, np.float64, fill=0.0)[0] == 3
    assert len(work.get("sums", 4000, np.float64)) == 4000
    assert work.get("sums", 2, np.uint8).dtype == np.uint8


@pytest.mark.parametrize("numpy_sort", [True, False], ids=["numpy's sort", "the compiled sort"])
@given(keys=arrays(np.uint64, st.integers(0, 600)))
def test_keys_are_sorted(numpy_sort, keys):
    expected = np.sort(keys)
    sort_keys(keys, sort_address() if numpy_sort else 0)
    assert np.array_equal(keys, expected)


def test_this_numpy_says_where_its_sort_is():
    assert sort_address() != 0
