# SPDX-License-Identifier: Apache-2.0
"""Whatever the layout of a file, the store gives back its counts."""

from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from layouts import small_blocks

from megacell.store import CellStore, convert
from megacell.store.sources.source import open_source


@dataclass
class Layout:
    """One way to write the same counts."""

    counts: np.ndarray
    kind: str
    dtype: str
    place: str
    wide_pointers: bool
    shuffled: bool
    ids_in_column: bool
    seed: int


values = st.one_of(st.just(0), st.just(0), st.integers(1, 5), st.sampled_from([254, 255, 256, 65535, 65536, 2**24 - 1]))
layouts = st.builds(
    Layout,
    counts=st.tuples(st.integers(1, 12), st.integers(1, 25)).flatmap(
        lambda shape: st.lists(values, min_size=shape[0] * shape[1], max_size=shape[0] * shape[1]).map(
            lambda flat: np.array([*flat[:-1], 1], np.int64).reshape(shape)
        )
    ),
    kind=st.sampled_from(["csr", "csc", "dense"]),
    dtype=st.sampled_from(["float32", "float64", "int32", "int64", "uint32"]),
    place=st.sampled_from(["X", "raw", "layer:counts"]),
    wide_pointers=st.booleans(),
    shuffled=st.booleans(),
    ids_in_column=st.booleans(),
    seed=st.integers(0, 99),
)


def write(layout: Layout, path: Path) -> list[str]:
    """Write the counts as the layout says; return the gene ids in the order of the columns."""
    cells, genes = layout.counts.shape
    ids = [f"ENSG{i:011d}" for i in range(genes)]
    var = pd.DataFrame({"gene_ids": ids}, index=[f"GENE{i}" for i in range(genes)])
    if not layout.ids_in_column:
        var = pd.DataFrame(index=ids)
    obs = pd.DataFrame(index=[f"cell-{i}" for i in range(cells)])
    matrix = layout.counts.astype(layout.dtype)
    if layout.kind != "dense":
        matrix = sp.csr_matrix(matrix) if layout.kind == "csr" else sp.csc_matrix(matrix)
    negative = np.full(layout.counts.shape, -1.0, np.float32)
    if layout.place == "X":
        data = ad.AnnData(matrix, obs=obs, var=var)
    elif layout.place == "raw":
        data = ad.AnnData(negative[:, :1], obs=obs, var=var.iloc[:1])
        data.raw = ad.AnnData(matrix, obs=obs, var=var)
    else:
        data = ad.AnnData(negative, obs=obs, var=var, layers={"counts": matrix})
    data.write_h5ad(path)
    if layout.kind != "dense":
        rewrite({"X": "X", "raw": "raw/X"}.get(layout.place, "layers/counts"), layout, path)
    return ids


def rewrite(place: str, layout: Layout, path: Path) -> None:
    """Store the same sparse matrix with int64 pointers, in disorder, with duplicates and explicit zeros."""
    random = np.random.default_rng(layout.seed)
    with h5py.File(path, "r+") as file:
        group = file[place]
        indptr, indices, data = (group[name][:] for name in ("indptr", "indices", "data"))
        new_indices, new_data, new_indptr = [], [], [0]
        for start, stop in pairwise(indptr):
            own, stored = indices[start:stop].tolist(), data[start:stop].tolist()
            if layout.shuffled and own:
                own, stored = [*own, own[0], own[-1]], [*stored[:-1], stored[-1] - 1, 0, 1]  # a zero, a duplicate
                order = random.permutation(len(own))
                own, stored = [own[i] for i in order], [stored[i] for i in order]
            new_indices += own
            new_data += stored
            new_indptr.append(len(new_indices))
        for name, numbers, dtype in (
            ("indptr", new_indptr, np.int64 if layout.wide_pointers else np.int32),
            ("indices", new_indices, np.int64 if layout.wide_pointers else np.int32),
            ("data", new_data, data.dtype),
        ):
            del group[name]
            group.create_dataset(name, data=np.array(numbers, dtype))


@given(layouts)
@settings(max_examples=80, deadline=None, suppress_health_check=list(HealthCheck))
def test_every_layout_gives_back_its_counts(made, layout):
    with TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        small_blocks(patch, values=7, rows=5)
        ids = write(layout, Path(folder) / "made.h5ad")
        report = convert(Path(folder) / "made.h5ad", Path(folder) / "store", allow_subset=True)
        store = CellStore.open(Path(folder) / "store")
        np.testing.assert_array_equal(made.all_counts(store, ids), layout.counts)
        assert report.sources[0].matrix == layout.place
        assert list(store.obs.index) == [f"cell-{i}" for i in range(len(layout.counts))]
        rows = store.rows(slice(None))
        assert rows.has_sorted_indices
        assert (rows.data > 0).all()


@given(layouts, st.integers(1, 6))
@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
def test_a_source_gives_its_blocks_in_the_files_order(layout, rows):
    with TemporaryDirectory() as folder:
        ids = write(layout, Path(folder) / "made.h5ad")
        with open_source(Path(folder) / "made.h5ad", layout.place) as source:
            blocks = list(source.blocks(rows))
            assert list(source.gene_ids) == ids
        assert all(block.shape[0] <= rows for block in blocks)
        np.testing.assert_array_equal(sp.vstack(blocks).toarray(), layout.counts)


@given(
    st.lists(st.integers(0, 40), min_size=0, max_size=60),
    st.lists(st.integers(1, 13), min_size=1, max_size=5),
)
@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
def test_rows_in_any_order_equal_numpys(made, asked, sizes):
    counts = np.vstack([made.counts(size, 20, seed=size, depth=900.0) for size in sizes])
    cells = [cell % len(counts) for cell in asked]
    with TemporaryDirectory() as folder:
        files, first = [], 0
        for number, size in enumerate(sizes):
            files.append(Path(folder) / f"part{number}.h5ad")
            data = made.anndata(counts[first : first + size], name=f"part{number}")
            data.uns["number"] = number  # no two files may be the same
            data.write_h5ad(files[-1])
            first += size
        convert(files, Path(folder) / "store", allow_subset=True, shard_bytes=400)
        store = CellStore.open(Path(folder) / "store")
        np.testing.assert_array_equal(store.rows(np.array(cells, np.int64)).toarray(), counts[cells])
        indptr, genes, taken = store.gather(cells)
        assert (indptr.dtype, genes.dtype, taken.dtype) == (np.int64, np.uint16, np.float32)
        np.testing.assert_array_equal(np.diff(indptr), (counts[cells] > 0).sum(axis=1))
