# SPDX-License-Identifier: Apache-2.0
"""What bench read measures reads the same cells by every method, and has a figure for each."""

import numpy as np
import pytest

from megacell.store import CellStore, convert
from megacell.store.commands.bench_read import bench_read, numpy_slices, stored_slices


@pytest.fixture
def store(counts, save, tmp_path) -> CellStore:
    convert(save(counts), tmp_path / "store", shard_bytes=10_000, allow_subset=True)
    return CellStore.open(tmp_path / "store")


def test_plain_slices_read_what_the_store_reads(store, counts):
    cells = np.array([59, 0, 5, 6, 7, 7])
    np.testing.assert_array_equal(numpy_slices(store)(cells).toarray(), counts[cells])


def test_every_method_has_its_figures(store):
    figures = bench_read(store, seconds=0.05)
    methods = {name for name, each in figures.items() if isinstance(each, dict)}
    assert {"store.rows", "numpy slices of the same maps", "scipy CSR in memory"} <= methods
    assert all(figures[name]["rows_per_cpu_second"] > 0 for name in methods)


def test_slices_as_stored_hold_all_but_the_large_counts(store, counts):
    cells = np.array([59, 0, 5, 6, 7, 7])
    genes, found, indptr = stored_slices(store)(cells)
    rows = np.repeat(np.arange(len(cells)), np.diff(indptr))
    np.testing.assert_array_equal(found, np.minimum(counts[cells][rows, genes], 255))
