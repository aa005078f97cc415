# SPDX-License-Identifier: Apache-2.0
"""Graphs between made cells, and what tells whether two are the same."""

import anndata as ad
import numpy as np
import scipy.sparse as sp
from layouts import make_anndata, make_counts
from sklearn.neighbors import kneighbors_graph

ALLOWED = {"allow_subset": True, "shard_bytes": 20_000}
NAMES = ("distances", "connectivities")


def knn(counts, k: int = 6) -> sp.csr_matrix:
    """Return distances to each cell's nearest, nearest first: float64."""
    return kneighbors_graph(counts, k, mode="distance")


def with_graphs(cells: int, seed: int, **options) -> ad.AnnData:
    """Return so many cells with `connectivities` (float32) and `distances` (float64)."""
    data = make_anndata(make_counts(cells, 300, seed=seed), name=f"s{seed}", **options)
    data.obs["age"] = np.arange(cells) % 7
    data.obsp["distances"] = knn(data.X)
    data.obsp["connectivities"] = data.obsp["distances"].copy().astype(np.float32)
    data.obsp["connectivities"].data[:] = 1 / (1 + data.obsp["connectivities"].data)
    return data


def assert_same_graph(found: sp.spmatrix, expected: sp.spmatrix) -> None:
    """Edges and weights, bit for bit, whatever their order."""
    found, expected = sp.csr_matrix(found).copy(), sp.csr_matrix(expected).copy()
    for matrix in (found, expected):
        matrix.sort_indices()
    assert found.shape == expected.shape
    np.testing.assert_array_equal(found.indptr, expected.indptr)
    np.testing.assert_array_equal(found.indices, expected.indices)
    np.testing.assert_array_equal(found.data, expected.data)
