# SPDX-License-Identifier: Apache-2.0
"""A store's graphs as they are read: mapped, picklable, sampled by a seed, and damages found before they mislead."""

import pickle
from dataclasses import replace
from pathlib import Path

import anndata as ad
import numpy as np
import pytest
import scipy.sparse as sp
from graph_files import ALLOWED, NAMES, assert_same_graph, with_graphs

from megacell.core.errors import DataError, UsageError
from megacell.store import CellStore, convert
from megacell.store.format.verify import verify


@pytest.fixture
def store(files, tmp_path) -> CellStore:
    convert(files[:2], tmp_path / "store", neighbours=NAMES, **ALLOWED)
    return CellStore.open(tmp_path / "store")


def mapped_file(address: int) -> str:
    """Return the file that this process has mapped at an address, as the system tells."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        first, last = (int(end, 16) for end in line.split()[0].split("-"))
        if first <= address < last:
            return line.split(maxsplit=5)[-1]
    return ""


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="the system does not tell what is mapped")
def test_neighbours_are_views_of_mapped_files(store):
    graph = store.neighbours("distances")
    assert graph is store.neighbours("distances")
    ids, weights = graph.of(5)
    for array, again, name in zip((ids, weights), graph.of(5), ("indices.npy", "weights.npy"), strict=True):
        assert array.ctypes.data == again.ctypes.data
        assert mapped_file(array.ctypes.data).endswith(f"neighbours/distances-1/{name}")
    with pytest.raises(ValueError, match="read-only"):
        ids[0] = 1


def test_a_graph_pickles_as_a_path(store, monkeypatch, tmp_path):
    monkeypatch.chdir(store.path.parent)
    graph = CellStore.open("store").neighbours("distances")
    expected = graph.rows([3, 100])
    content = pickle.dumps(graph)
    monkeypatch.chdir(tmp_path / "..")
    assert len(content) < 1000
    assert_same_graph(pickle.loads(content).rows([3, 100]), expected)  # our own bytes


@pytest.mark.parametrize("cells", [[3, 3, 100, 0], slice(110, 2, -3), np.arange(121) % 4 == 0, []])
def test_rows_take_cells_as_the_stores_rows_do(cells, store, files):
    expected = sp.block_diag([ad.read_h5ad(file).obsp["distances"] for file in files[:2]], format="csr")
    assert_same_graph(store.neighbours("distances").rows(cells), expected[cells])


def test_a_cell_that_is_not_there_is_an_error(store):
    graph = store.neighbours("distances")
    for ask in (lambda: graph.of(121), lambda: graph.of(-1), lambda: graph.rows([121]), lambda: graph.sample([121])):
        with pytest.raises(DataError, match=r"no cell (121|-1); there are 121"):
            ask()


@pytest.mark.parametrize("weighted", [True, False], ids=["by weight", "all alike"])
def test_a_draw_depends_on_the_seed_and_the_cell_alone(weighted, store):
    graph = store.neighbours("connectivities")
    whole = graph.sample(slice(None), 8, seed=3, weighted=weighted)
    assert whole.dtype == np.int64
    order = np.random.default_rng(0).permutation(121)
    np.testing.assert_array_equal(graph.sample(order, 8, seed=3, weighted=weighted), whole[order])
    np.testing.assert_array_equal(graph.sample([7], 3, seed=3, weighted=weighted), whole[[7], :3])
    assert (graph.sample(slice(None), 8, seed=4, weighted=weighted) != whole).mean() > 0.5
    for cell in (0, 60, 120):
        assert set(whole[cell]) <= set(graph.of(cell)[0].tolist())


@pytest.mark.parametrize("weighted", [True, False], ids=["by weight", "all alike"])
def test_neighbours_are_drawn_as_often_as_they_should_be(weighted, store):
    graph = store.neighbours("connectivities")
    n = 20_000
    for cell, drawn in enumerate(graph.sample(slice(20), n, seed=1, weighted=weighted)):
        ids, weights = graph.of(cell)
        share = weights / weights.sum(dtype=np.float64) if weighted else np.full(len(ids), 1 / len(ids))
        found = np.array([(drawn == each).sum() for each in ids]) / n
        assert (np.abs(found - share) < 5 * np.sqrt(share * (1 - share) / n)).all()


def test_cells_without_neighbours_give_themselves(made, save, tmp_path):
    data = with_graphs(60, 1)
    graph = data.obsp["distances"].tolil()
    graph[5] = 0
    data.obsp["distances"] = graph.tocsr()
    zeros = slice(data.obsp["distances"].indptr[8], data.obsp["distances"].indptr[9])
    data.obsp["distances"].data[zeros] = 0
    data.obsp["distances"].data[data.obsp["distances"].indptr[9]] = -1
    convert(save(data), tmp_path / "store", neighbours="distances", **ALLOWED)
    convert(save(made.counts(10, 300, seed=2), "b.h5ad"), tmp_path / "store", append=True, **ALLOWED)
    found = CellStore.open(tmp_path / "store").neighbours("distances")
    assert found.sample([5, 65, 69], 2).tolist() == [[5, 5], [65, 65], [69, 69]]
    assert found.sample([8], 2).tolist() == [[8, 8]]
    assert len(found.of(8)[0]) == 6
    assert 8 not in found.sample([8], 20, weighted=False)
    with pytest.raises(DataError, match="cell 9 has negative weights in distances; draw with weighted=False"):
        found.sample(slice(None))
    assert set(found.sample([9], 50, weighted=False)[0]) <= set(found.of(9)[0].tolist())


@pytest.mark.parametrize("options", [{"seed": -1}, {"seed": 2**64}, {"n": -1}])
def test_a_seed_or_number_out_of_range_is_wrong_usage(options, store):
    with pytest.raises(UsageError):
        store.neighbours("distances").sample([0], **options)


@pytest.mark.parametrize(
    ("name", "position", "value"), [("indptr", 5, 2**40), ("indptr", 5, -3), ("indices", 30, 2**32 - 1)]
)
def test_numbers_that_lead_astray_are_an_error_and_no_crash(store, name, position, value):
    path = store.path / f"neighbours/distances-1/{name}.npy"
    array = np.load(path)
    array[position] = value
    np.save(path, array)
    graph = CellStore.open(store.path).neighbours("distances")
    for ask in (
        lambda: [graph.of(i) for i in range(9)],
        lambda: graph.rows(slice(9)),
        lambda: graph.sample(range(9), 99),
    ):
        with pytest.raises(DataError, match=r"distances-1: damaged; run `megacell verify"):
            ask()
    assert any("distances-1" in line for line in verify(store.path).damages)


@pytest.mark.parametrize("name", ["indptr.npy", "indices.npy", "weights.npy"])
def test_a_truncated_or_missing_array_is_found_before_it_is_read(name, store):
    path = store.path / "neighbours/distances-1" / name
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(DataError, match=rf"{name}.*bytes, should be"):
        CellStore.open(store.path).neighbours("distances").of(0)
    path.unlink()
    with pytest.raises(DataError, match=rf"{name}.*cannot be read"):
        CellStore.open(store.path).neighbours("distances").of(0)


def test_a_graph_with_another_writers_name_is_found_by_it(store):
    """A name without a generation is the graph's own."""
    (store.path / "neighbours/distances-1").rename(store.path / "neighbours/plain")
    renamed = replace(store.manifest, neighbours={"plain": store.manifest.neighbours["distances-1"]})
    (store.path / "manifest.json").write_bytes(renamed.dumps())
    assert CellStore.open(store.path).neighbours("plain").edges == store.neighbours("distances").edges
