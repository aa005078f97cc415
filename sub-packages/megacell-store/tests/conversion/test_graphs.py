# SPDX-License-Identifier: Apache-2.0
"""Graphs between cells: what a store holds equals the files' obsp, block by block, however the store was made."""

from pathlib import Path

import anndata as ad
import h5py
import numpy as np
import pytest
import scipy.sparse as sp
from graph_files import ALLOWED, NAMES, assert_same_graph, knn, with_graphs
from hypothesis import given, settings
from hypothesis import strategies as st

from megacell.core.errors import DataError, UsageError
from megacell.store import CellStore, convert
from megacell.store.conversion import conversion
from megacell.store.format.manifest import Manifest
from megacell.store.format.verify import verify

LAYOUTS = {
    "csr": sp.csr_matrix,
    "csc": sp.csc_matrix,
    "dense": lambda graph: graph.toarray(),
    "a sparse array": sp.csr_array,
}


@pytest.mark.parametrize(
    ("form", "layout"), [*(("h5ad", layout) for layout in LAYOUTS), ("zarr", "csr"), ("zarr", "csc")]
)
def test_a_graph_comes_back_edge_by_edge(form, layout, tmp_path):
    data = with_graphs(60, 1)
    expected = data.obsp["distances"].copy()
    data.obsp["distances"] = LAYOUTS[layout](expected)
    path = tmp_path / f"made.{form}"
    getattr(data, f"write_{form}")(path)
    convert(path, tmp_path / "store", neighbours="distances", **ALLOWED)
    graph = CellStore.open(tmp_path / "store").neighbours("distances")
    assert (len(graph), graph.cells, graph.edges) == (60, 60, expected.nnz)
    assert_same_graph(graph.rows(slice(None)), expected)
    assert verify(tmp_path / "store").damages == []


def test_weights_keep_their_type_and_neighbours_their_order(save, tmp_path):
    data = with_graphs(60, 1)
    convert(save(data), tmp_path / "store", neighbours=["connectivities", "distances"], **ALLOWED)
    store = CellStore.open(tmp_path / "store")
    for name, dtype in (("connectivities", np.float32), ("distances", np.float64)):
        expected = data.obsp[name]
        for cell in (0, 17, 59):
            ids, weights = store.neighbours(name).of(cell)
            assert (ids.dtype, weights.dtype) == (np.uint32, dtype)
            row = slice(expected.indptr[cell], expected.indptr[cell + 1])
            np.testing.assert_array_equal(ids, expected.indices[row])
            np.testing.assert_array_equal(weights, expected.data[row])
    files = sorted(path.relative_to(store.path).as_posix() for path in (store.path / "neighbours").rglob("*.npy"))
    assert files == [
        f"neighbours/{name}-1/{file}.npy"
        for name in ("connectivities", "distances")
        for file in ("indices", "indptr", "weights")
    ]


def test_several_files_make_diagonal_blocks_and_one_without_a_graph_none(made, save, tmp_path):
    first, third = with_graphs(50, 1), with_graphs(70, 3)
    third.obsp["distances"] = third.obsp["distances"].astype(np.float32)
    files = [save(first, "a.h5ad"), save(made.counts(40, 300, seed=2), "b.h5ad"), save(third, "c.h5ad")]
    report = convert(files, tmp_path / "store", neighbours="distances", **ALLOWED)
    nothing = sp.csr_matrix((40, 40))
    graph = CellStore.open(tmp_path / "store").neighbours("distances")
    assert_same_graph(
        graph.rows(slice(None)), sp.block_diag([first.obsp["distances"], nothing, third.obsp["distances"]])
    )
    notes = [[note for note in source.notes if "graph" in note] for source in report.sources]
    assert notes == [[], ["has no graph distances: its cells have no neighbours there"], []]


@pytest.mark.parametrize("options", [{"where": "age < 5"}, {"min_counts": 2500}], ids=["by a query", "by their counts"])
def test_edges_to_cells_that_were_left_out_are_dropped_and_said(options, save, tmp_path):
    data = with_graphs(80, 1)
    keep = np.asarray(data.obs["age"] < 5) if "where" in options else np.asarray(data.X.sum(1) >= 2500).ravel()
    assert 10 < keep.sum() < 75
    report = convert(save(data), tmp_path / "store", neighbours="distances", **options, **ALLOWED)
    graph = CellStore.open(tmp_path / "store").neighbours("distances")
    expected = data.obsp["distances"][keep]
    assert_same_graph(graph.rows(slice(None)), expected[:, keep])
    lost = expected.nnz - expected[:, keep].nnz
    assert lost > 0
    assert f"distances: {lost:,} edges to cells that were left out dropped" in report.sources[0].notes


@pytest.mark.parametrize("examples", [4, pytest.param(60, marks=pytest.mark.exhaustive)], ids=["some", "many"])
def test_whatever_the_files_filters_and_shards_the_graph_is_the_files_blocks(examples, made, tmp_path_factory):
    settings(max_examples=examples, deadline=None)(given(data=st.data())(check_blocks))(made, tmp_path_factory)


def check_blocks(made, tmp_path_factory, data) -> None:
    folder, blocks, files = tmp_path_factory.mktemp("any"), [], []
    threshold = data.draw(st.integers(1, 7), label="keep ages below")
    for number in range(data.draw(st.integers(1, 4), label="files")):
        cells = data.draw(st.integers(1, 40), label="cells")
        random = np.random.default_rng(data.draw(st.integers(0, 2**32), label="seed"))
        one = made.anndata(made.counts(cells, 60, seed=number, depth=400.0), name=f"f{number}")
        one.obs["age"] = random.integers(0, 7, cells)
        one.obs.loc[one.obs_names[0], "age"] = 0  # of each file a cell is left
        graph = sp.random(cells, cells, density=float(random.random()) * 0.3, format="csr", rng=random)
        if number == 0 or random.random() < 0.7:
            one.obsp["g"] = graph if random.random() < 0.5 else graph.tocsc()
        else:
            graph = sp.csr_matrix((cells, cells))
        keep = np.asarray(one.obs["age"] < threshold)
        blocks.append(graph[keep][:, keep])
        one.write_h5ad(folder / f"f{number}.h5ad")
        files.append(folder / f"f{number}.h5ad")
    size = data.draw(st.sampled_from([500, 3_000, 1 << 30]), label="shard bytes")
    options = {"where": f"age < {threshold}", "allow_subset": True, "allow_low_counts": True, "shard_bytes": size}
    appended = data.draw(st.integers(0, len(files) - 1), label="files appended")
    convert(files[: len(files) - appended], folder / "store", neighbours="g", **options)
    for file in files[len(files) - appended :]:
        wanted = ("g",) if "g" in ad.read_h5ad(file).obsp else ()
        convert(file, folder / "store", append=True, neighbours=wanted, **options)
    graph = CellStore.open(folder / "store").neighbours("g")
    assert_same_graph(graph.rows(slice(None)), sp.block_diag(blocks, format="csr"))
    assert verify(folder / "store").damages == []


# -- however the work is done


@pytest.fixture
def whole(files, tmp_path) -> Manifest:
    """What one undisturbed process makes of the files."""
    convert(files, tmp_path / "whole", neighbours=NAMES, **ALLOWED)
    return Manifest.open(tmp_path / "whole")


def left(store: Path) -> list[str]:
    return sorted(path.relative_to(store).as_posix() for path in store.rglob("*"))


def test_parts_and_a_finish_make_the_same_graphs(files, whole, tmp_path):
    for number in (2, 1):
        convert(files, tmp_path / "store", neighbours=NAMES, part=(number, 3), **ALLOWED)
    convert(files, tmp_path / "store", neighbours=NAMES, finish=True, **ALLOWED)
    assert Manifest.open(tmp_path / "store").digest == whole.digest
    assert left(tmp_path / "store") == left(tmp_path / "whole")


@pytest.mark.parametrize("loss", ["nothing", "an array of a shard's edges", "a shard's edges cut short"])
def test_after_a_kill_edges_that_were_set_aside_are_taken_if_they_are_whole(loss, files, whole, tmp_path, monkeypatch):
    store, real, done = tmp_path / "store", conversion.attempt, tmp_path / "done"
    monkeypatch.setattr(conversion, "publish", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        convert(files, store, neighbours=NAMES, **ALLOWED)
    monkeypatch.undo()
    name = store / "plan.tmp/edges-00001/distances-indices.npy"
    if loss == "an array of a shard's edges":
        name.unlink()
    elif loss != "nothing":
        name.write_bytes(name.read_bytes()[:-4])
    done.touch()  # shards are made in another process, so what was made is told by a file

    def noted(place, number):
        done.write_text(f"{done.read_text()} {number}")
        return real(place, number)

    monkeypatch.setattr(conversion, "attempt", noted)
    convert(files, store, neighbours=NAMES, **ALLOWED)
    assert done.read_text().split() == ([] if loss == "nothing" else ["1"])
    assert Manifest.open(store).digest == whole.digest
    assert left(store) == left(tmp_path / "whole")


def test_another_choice_of_graphs_is_another_request(files, tmp_path, monkeypatch):
    monkeypatch.setattr(conversion, "publish", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        convert(files, tmp_path / "store", neighbours=NAMES, **ALLOWED)
    monkeypatch.undo()
    lines = []
    convert(files, tmp_path / "store", neighbours="distances", log=lines.append, **ALLOWED)
    assert not any("going on" in line for line in lines)
    assert list(CellStore.open(tmp_path / "store").manifest.graphs) == ["distances"]


def test_appending_grows_a_graph_and_older_readers_keep_theirs(files, made, save, tmp_path):
    store, blocks = tmp_path / "store", [ad.read_h5ad(file).obsp["distances"] for file in files]
    convert(files[0], store, neighbours="distances", **ALLOWED)
    old = CellStore.open(store)
    convert(save(made.counts(30, 300, seed=9), "plain.h5ad"), store, append=True, **ALLOWED)
    kept = CellStore.open(store).neighbours("distances")
    assert (len(kept), kept.cells) == (90, 60)
    assert_same_graph(kept.rows(slice(None)), sp.block_diag([blocks[0], sp.csr_matrix((30, 30))]))
    assert len(kept.of(75)[0]) == 0
    convert(files[1:], store, append=True, neighbours=["distances", "connectivities"], **ALLOWED)
    grown = CellStore.open(store)
    expected = sp.block_diag([blocks[0], sp.csr_matrix((30, 30)), *blocks[1:]])
    assert_same_graph(grown.neighbours("distances").rows(slice(None)), expected)
    assert sorted(grown.manifest.neighbours) == ["connectivities-3", "distances-3"]
    assert grown.neighbours("connectivities").rows(slice(90)).nnz == 0
    assert_same_graph(old.neighbours("distances").rows(slice(None)), blocks[0])
    assert_same_graph(CellStore.open(store, generation=2).neighbours("distances").rows(slice(60)), kept.rows(slice(60)))
    with pytest.raises(DataError, match=r"no graph 'connectivities'; there are distances"):
        old.neighbours("connectivities")
    assert verify(store).damages == []
    assert verify(store).files == sum(path.is_file() for path in store.rglob("*"))


def test_a_grown_graph_widens_its_weights_where_it_must(save, tmp_path):
    first, second = with_graphs(40, 1), with_graphs(50, 2)
    second.obsp["connectivities"] = second.obsp["distances"]
    convert(save(first, "a.h5ad"), tmp_path / "store", neighbours="connectivities", **ALLOWED)
    convert(save(second, "b.h5ad"), tmp_path / "store", append=True, neighbours="connectivities", **ALLOWED)
    graph = CellStore.open(tmp_path / "store").neighbours("connectivities")
    assert graph.of(0)[1].dtype == np.float64
    expected = sp.block_diag([first.obsp["connectivities"].astype(np.float64), second.obsp["connectivities"]])
    assert_same_graph(graph.rows(slice(None)), expected)


# -- what is refused


def test_a_graph_that_no_file_has_is_wrong_usage(files, tmp_path):
    for options in ({}, {"dry_run": True}):
        with pytest.raises(
            UsageError, match="knn: no file has that graph in obsp; there are connectivities, distances"
        ):
            convert(files, tmp_path / "store", neighbours=["distances", "knn"], **options, **ALLOWED)
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize("name", ["", "..", ".hidden", "a/b", "a\\b", "a\nb", "x" * 201])
def test_a_name_that_can_be_no_folders_is_wrong_usage(name, files, tmp_path):
    with pytest.raises(UsageError, match="cannot be a folder's name"):
        convert(files, tmp_path / "store", neighbours=name, **ALLOWED)


def spoil(path: Path, how: str) -> None:
    with h5py.File(path, "r+") as file:
        graph = file["obsp/distances"]
        if how == "not square":
            graph.attrs["shape"] = np.array([60, 59])
        elif how == "of another size":
            del file["obsp/distances"]
            ad.io.write_elem(file["obsp"], "distances", sp.eye(59, format="csr", dtype=np.float32))
        elif how == "of a negative shape":
            graph.attrs["shape"] = np.array([-60, -60])
        elif how == "without indptr":
            del graph["indptr"]
        elif how == "no matrix":
            del file["obsp"]
            file["obsp/distances"] = np.array(["text"], dtype="S")
        elif how == "NaN":
            graph["data"][100] = np.nan
        elif how == "infinite":
            graph["data"][100] = np.inf
        elif how == "an edge to no cell":
            graph["indices"][100] = 60
        elif how == "an edge to a negative cell":
            graph["indices"][100] = -1
        else:
            graph["indptr"][7] = 10**6


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ("not square", r"is \(60, 59\), not square over 60 cells"),
        ("of another size", r"is \(59, 59\), not square over 60 cells"),
        ("of a negative shape", r"indptr of \(61,\) entries for a matrix of \(-60, -60\)"),
        ("without indptr", "cannot be read"),
        ("no matrix", "is no matrix"),
        ("NaN", "cell 16: a NaN or infinite weight"),
        ("infinite", "cell 16: a NaN or infinite weight"),
        ("an edge to no cell", r"an index outside 0 … 59"),
        ("an edge to a negative cell", r"an index outside 0 … 59"),
        ("pointers that lead astray", "indptr does not fit the values"),
    ],
)
def test_a_bad_graph_is_refused_by_name(how, reason, files, tmp_path):
    spoil(files[0], how)
    with pytest.raises(DataError, match=rf"f0\.h5ad: obsp/distances.*{reason}") as raised:
        convert(files, tmp_path / "store", neighbours="distances", **ALLOWED)
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize("how", ["not square", "NaN"], ids=["at the first look", "further on"])
def test_a_file_with_a_bad_graph_can_be_left_out(how, files, tmp_path):
    spoil(files[0], how)
    report = convert(files[:2], tmp_path / "store", neighbours="distances", skip_bad=True, **ALLOWED)
    assert len(report.left_out) == 1
    store = CellStore.open(tmp_path / "store")
    assert_same_graph(store.neighbours("distances").rows(slice(None)), ad.read_h5ad(files[1]).obsp["distances"])


def test_an_obsp_that_cannot_be_read_is_refused_by_name(save, tmp_path):
    path = save(with_graphs(60, 1))
    with h5py.File(path, "r+") as file:
        del file["obsp"]
        file["obsp"] = 3
    with pytest.raises(DataError, match=rf"{path.name}: obsp cannot be read .*fetch it again"):
        convert(path, tmp_path / "store", allow_subset=True)
    assert not (tmp_path / "store").exists()


def test_a_file_with_a_bad_graph_is_taken_where_the_graph_is_not_asked_for(files, tmp_path):
    spoil(files[0], "NaN")
    convert(files, tmp_path / "store", **ALLOWED)
    store = CellStore.open(tmp_path / "store")
    assert len(store) == 183
    with pytest.raises(DataError, match="no graph 'distances'; it has none"):
        store.neighbours("distances")


def test_real_cells_keep_their_nearest_neighbours(real_cells, tmp_path):
    blocks, files = [], [real_cells / "pbmc5k_protein.h5ad"]
    for name in ("pbmc4k_b", "pbmc4k_a"):
        data = ad.read_h5ad(real_cells / f"{name}.h5ad")
        logs = np.log1p(data.X.toarray())
        data.obsp["distances"] = knn(logs[:, logs.var(0).argsort()[-500:]], 15)
        blocks.insert(0, data.obsp["distances"])
        data.write_h5ad(tmp_path / f"{name}.h5ad")
        files.insert(0, tmp_path / f"{name}.h5ad")
    blocks.append(sp.csr_matrix((200, 200)))
    convert(files, tmp_path / "store", neighbours="distances", shard_bytes=3_000_000)
    store = CellStore.open(tmp_path / "store")
    assert len(store.manifest.shards) > 2
    graph = store.neighbours("distances")
    assert_same_graph(graph.rows(slice(None)), sp.block_diag(blocks))
    types = store.obs["cell_type"].astype(object).to_numpy()
    drawn = graph.sample(slice(1100), 5, seed=1, weighted=False)
    known = ~store.obs["cell_type"].isna().to_numpy()
    agreeing = [types[drawn[i]][known[drawn[i]]] == types[i] for i in range(1100) if known[i]]
    assert np.concatenate(agreeing).mean() > 0.6  # neighbours are of a kind, and not cells drawn at random
