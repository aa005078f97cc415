# SPDX-License-Identifier: Apache-2.0
"""Archives of bionemo-scdl, made after its own layout: read, mended or refused, and written.

Where bionemo-scdl is at hand (an interpreter that has it, named by $MEGACELL_SCDL_PYTHON), it is the oracle both ways.
"""

import json
import os
import shutil
import struct
import subprocess
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import scipy.sparse as sp
from sklearn.neighbors import kneighbors_graph

from megacell.core.errors import DataError, UsageError
from megacell.store import CellStore, convert
from megacell.store.maintain.export_scdl import export_scdl

ALLOWED = {"allow_subset": True}
STALE = {"DATA": 1, "ROWPTR": 1, "COLPTR": 1}
NUMBERS = {"uint8": 1, "uint16": 2, "uint32": 3, "uint64": 4, "float16": 5, "float32": 6, "float64": 7}


def text(value: str) -> bytes:
    return struct.pack(">I", len(value)) + value.encode()


def write_header(archive: Path, types: dict[str, str], lengths: dict[str, int]) -> None:
    parts = [b"SCDL", bytes([0, 1, 0, 1]), struct.pack(">II", 1, 3)]
    for name in ("DATA", "ROWPTR", "COLPTR"):
        parts += [text(name), struct.pack(">QIB", lengths[name], NUMBERS[types[name]], 0)]
    (archive / "header.sch").write_bytes(b"".join(parts) + struct.pack(">I", 0))


def write_archive(archive: Path, blocks: list[tuple[np.ndarray, pd.DataFrame]], data: str = "float32") -> Path:
    """Write blocks of counts, each with its own genes, as bionemo-scdl 0.1.3 does."""
    archive.mkdir()
    rows = [sp.csr_matrix(counts) for counts, _ in blocks]
    indptr = np.concatenate([[0], np.cumsum(np.concatenate([np.diff(r.indptr) for r in rows]))])
    types = {"DATA": data, "ROWPTR": "uint32", "COLPTR": "uint16"}
    arrays = {
        "DATA": np.concatenate([r.data for r in rows]),
        "ROWPTR": indptr,
        "COLPTR": np.concatenate([r.indices for r in rows]),
    }
    for name, file in (("DATA", "data.npy"), ("ROWPTR", "row_ptr.npy"), ("COLPTR", "col_ptr.npy")):
        arrays[name].astype(types[name]).tofile(archive / file)
    write_header(archive, types, {name: len(array) for name, array in arrays.items()})
    (archive / "metadata.json").write_text(json.dumps({"num_rows": len(indptr) - 1}))
    (archive / "version.json").write_text('"0.1.3"')
    folder = archive / "var_features"
    folder.mkdir()
    for i, (_, var) in enumerate(blocks):
        table = pa.Table.from_pandas(var, preserve_index=False)
        pq.write_table(table, folder / f"dataframe_{i:0{len(str(len(blocks)))}d}.parquet")
    ends = np.cumsum([len(counts) for counts, _ in blocks])
    np.save(folder / "cumulative_sum_index.npy", np.concatenate([[-1], ends]))
    return archive


def genes(first: int, n: int) -> pd.DataFrame:
    return pd.DataFrame({"gene_id": [f"ENSG{i:011d}" for i in range(first, first + n)]})


def check(store: Path, blocks: list[tuple[np.ndarray, pd.DataFrame]], made) -> None:
    opened, first = CellStore.open(store), 0
    for number, (counts, var) in enumerate(blocks):
        found = made.all_counts(opened, var["gene_id"])[first : first + len(counts)]
        np.testing.assert_array_equal(found, counts)
        assert len(opened.panel(number)) == len(var)
        first += len(counts)
    assert len(opened) == first


@pytest.fixture
def blocks(made) -> list[tuple[np.ndarray, pd.DataFrame]]:
    """Twelve blocks whose genes differ."""
    return [(made.counts(25, 120, seed=i), genes(40 * i, 120)) for i in range(12)]


@pytest.mark.parametrize("data", ["float32", "float64", "uint16", "uint32"])
def test_an_archive_of_blocks_with_differing_genes_is_read(data, blocks, made, tmp_path):
    archive = write_archive(tmp_path / "archive", blocks, data)
    convert(archive, tmp_path / "store", **ALLOWED)
    check(tmp_path / "store", blocks, made)
    assert len(CellStore.open(tmp_path / "store").sources) == 12


def test_shifted_gene_blocks_are_repaired(blocks, made, tmp_path):
    archive = write_archive(tmp_path / "archive", blocks)
    stale = archive / "var_features/dataframe_0.parquet"
    shutil.copy(archive / "var_features/dataframe_00.parquet", stale)  # sorts after 00: every later block is shifted
    report = convert(archive, tmp_path / "store", **ALLOWED)
    check(tmp_path / "store", blocks, made)
    assert any("1 stale tables in var_features" in note for note in report.sources[0].notes)


def test_gene_blocks_that_cannot_be_told_apart_are_refused(blocks, tmp_path):
    archive = write_archive(tmp_path / "archive", blocks)
    (archive / "var_features/dataframe_03.parquet").rename(archive / "var_features/dataframe_3.parquet")
    (archive / "var_features/dataframe_00.parquet").unlink()
    with pytest.raises(DataError, match="11 tables for 12 blocks of rows"):
        convert(archive, tmp_path / "store", **ALLOWED)


@pytest.mark.parametrize(
    ("data", "stated"),
    [("uint32", "float32"), ("float32", "uint32"), ("float64", "float32"), ("uint32", "uint8"), ("float32", "uint16")],
)
def test_a_stale_header_is_repaired_where_sizes_and_values_prove_it(data, stated, blocks, made, tmp_path):
    blocks = [(np.minimum(counts, 200), var) for counts, var in blocks]
    archive = write_archive(tmp_path / "archive", blocks, data)
    write_header(archive, {"DATA": stated, "ROWPTR": "uint16", "COLPTR": "uint8"}, STALE)
    report = convert(archive, tmp_path / "store", **ALLOWED)
    check(tmp_path / "store", blocks, made)
    assert any("header.sch is stale" in note for note in report.sources[0].notes)


@pytest.mark.parametrize(("data", "stated"), [("uint8", "float32"), ("float16", "uint16"), ("uint16", "float64")])
def test_a_stale_header_that_leaves_a_doubt_is_refused(data, stated, blocks, tmp_path):
    archive = write_archive(tmp_path / "archive", blocks, data)
    write_header(archive, {"DATA": stated, "ROWPTR": "uint32", "COLPTR": "uint16"}, STALE)
    with pytest.raises(DataError, match=r"stale header|no counts found"):
        convert(archive, tmp_path / "store", **ALLOWED)


@pytest.mark.parametrize("name", ["data.npy", "col_ptr.npy", "row_ptr.npy"])
@pytest.mark.parametrize("share", [0.5, 0.99])
def test_truncated_arrays_are_refused(name, share, blocks, tmp_path):
    archive = write_archive(tmp_path / "archive", blocks)
    content = (archive / name).read_bytes()
    (archive / name).write_bytes(content[: int(len(content) * share)])
    with pytest.raises(DataError, match=rf"{name}.*cut short|row_ptr\.npy leads|hold no"):
        convert(archive, tmp_path / "store", **ALLOWED)
    assert not (tmp_path / "store").exists()


def test_counts_of_raw_beside_the_genes_of_x_are_refused(made, tmp_path):
    """Its own reader pairs raw.X, which has more columns, with X's table of genes."""
    archive = write_archive(tmp_path / "archive", [(made.counts(40, 300), genes(0, 200))])
    with pytest.raises(DataError, match="an index outside 0 … 199"):
        convert(archive, tmp_path / "store", **ALLOWED)


def test_genes_without_their_ids_are_refused(made, tmp_path):
    """The index of var is dropped when there is another column."""
    archive = write_archive(
        tmp_path / "archive", [(made.counts(40, 300), pd.DataFrame({"highly_variable": [True] * 300}))]
    )
    with pytest.raises(DataError, match="genes are numbered, not named"):
        convert(archive, tmp_path / "store", **ALLOWED)


def test_a_square_matrix_is_said_to_need_a_look(made, tmp_path):
    archive = write_archive(tmp_path / "archive", [(made.counts(100, 100), genes(0, 100))])
    report = convert(archive, tmp_path / "store", **ALLOWED)
    assert any("as many cells as genes" in note for note in report.sources[0].notes)


@pytest.mark.parametrize("kind", [sp.csr_matrix, sp.csc_matrix], ids=["csr", "csc"])
def test_a_square_matrix_is_never_transposed_by_us(kind, made, save, tmp_path):
    counts = made.counts(100, 100)
    convert(save(made.anndata(kind(counts))), tmp_path / "store", **ALLOWED)
    np.testing.assert_array_equal(CellStore.open(tmp_path / "store").rows(slice(None)).toarray(), counts)


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("header.sch", b"SCDL\0\1\0\1\0\0\0\1\0\0\0\3\xff\xff"),
        ("header.sch", b"junk"),
        ("metadata.json", b"{}"),
        ("metadata.json", b'{"num_rows": -3}'),
        ("var_features/cumulative_sum_index.npy", b"junk"),
        ("var_features/dataframe_03.parquet", b"junk"),
    ],
)
def test_damaged_parts_are_refused_by_name(file, content, blocks, tmp_path):
    archive = write_archive(tmp_path / "archive", blocks)
    (archive / file).write_bytes(content)
    with pytest.raises(DataError, match=r"archive"):
        convert(archive, tmp_path / "store", **ALLOWED)
    assert not (tmp_path / "store").exists()


@pytest.fixture
def described(counts, made, save, tmp_path) -> CellStore:
    """A store with metadata of every kind."""
    obs = pd.DataFrame({"tissue": pd.Categorical(["lung", None] * 30), "age": range(60)}, [f"c{i}" for i in range(60)])
    convert(save(made.anndata(counts, obs=obs)), tmp_path / "store", shard_bytes=10_000, **ALLOWED)
    return CellStore.open(tmp_path / "store")


def test_what_is_exported_comes_back(described, counts, tmp_path):
    export_scdl(described, tmp_path / "archive")
    assert np.fromfile(tmp_path / "archive/data.npy", np.float32).tolist() == described.rows(slice(None)).data.tolist()
    convert(tmp_path / "archive", tmp_path / "back", **ALLOWED)
    back = CellStore.open(tmp_path / "back")
    np.testing.assert_array_equal(back.rows(slice(None)).toarray(), counts)
    assert list(back.gene_ids) == list(described.gene_ids)
    assert back.obs["age"].tolist() == list(range(60))
    assert back.obs.index.tolist() == list(described.obs.index)
    with pytest.raises(UsageError, match="exists already"):
        export_scdl(described, tmp_path / "archive")


def write_neighbours(archive: Path, graph: sp.csr_matrix) -> None:
    graph.indptr.astype(np.uint64).tofile(archive / "neighbor_indptr.npy")
    graph.indices.astype(np.uint32).tofile(archive / "neighbor_indices.npy")
    graph.data.astype(np.float32).tofile(archive / "neighbor_values.npy")


@pytest.fixture
def graph() -> sp.csr_matrix:
    """Weights that float32 holds, among the 300 cells of `blocks`: none leads from one block to another."""
    parts = [sp.random(25, 25, 0.2, "csr", np.float32, rng=np.random.default_rng(i)) for i in range(12)]
    return sp.block_diag(parts, format="csr")


def test_an_archives_neighbours_go_by_the_name_asked_for(blocks, graph, tmp_path):
    archive = write_archive(tmp_path / "archive", blocks)
    write_neighbours(archive, graph)
    convert(archive, tmp_path / "store", neighbours="knn", **ALLOWED)
    found = CellStore.open(tmp_path / "store").neighbours("knn").rows(slice(None))
    assert found.dtype == np.float32
    assert (found != graph).nnz == 0
    with pytest.raises(UsageError, match=r"archive.*one graph.*give one --neighbours"):
        convert(archive, tmp_path / "other", neighbours=["a", "b"], **ALLOWED)
    convert(archive, tmp_path / "without", **ALLOWED)
    assert CellStore.open(tmp_path / "without").manifest.neighbours == {}


def test_an_archive_that_was_joined_has_neighbours_of_its_first_rows_only(blocks, graph, tmp_path):
    """Joining leaves the arrays as they were, so they are shorter than the rows."""
    archive = write_archive(tmp_path / "archive", blocks)
    write_neighbours(archive, graph[:40][:, :40])
    report = convert(archive, tmp_path / "store", neighbours="knn", **ALLOWED)
    found = CellStore.open(tmp_path / "store").neighbours("knn").rows(slice(None))
    assert found[40:].nnz == 0
    assert (found[:40, :40] != graph[:40, :40]).nnz == 0
    said = [[note for note in source.notes if "behind the archive's graph" in note] for source in report.sources]
    assert said == [[], *([f"{n} cells lie behind the archive's graph: no neighbours"] for n in [10] + [25] * 10)]


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        ("no neighbours of more rows than there are", "does not agree with itself"),
        ("a weight too few", "does not agree with itself"),
        ("an edge too few", "does not agree with itself"),
        ("a byte too few", "neighbor_values.npy: cannot be read"),
        ("no weights", "neighbor_values.npy: cannot be read"),
        ("pointers that descend", "indptr does not fit the values"),
        ("an edge between blocks of genes", "an edge leads outside rows 0 to 25"),
        ("an edge to no row", "an edge leads outside rows 275 to 300"),
        ("NaN", "cell 0: a NaN or infinite weight"),
    ],
)
def test_neighbours_that_do_not_fit_are_refused(damage, reason, blocks, graph, tmp_path):
    archive = write_archive(tmp_path / "archive", blocks)
    if damage == "no neighbours of more rows than there are":
        graph = sp.block_diag([graph, sp.csr_matrix((5, 5))], format="csr")
    elif damage == "pointers that descend":
        graph.indptr[7] = graph.indptr[5] - 1
    elif damage == "an edge between blocks of genes":
        graph.indices[0] = 30
    elif damage == "an edge to no row":
        graph.indices[-1] = 300
    elif damage == "NaN":
        graph.data[0] = np.nan
    write_neighbours(archive, graph)
    values, indices = archive / "neighbor_values.npy", archive / "neighbor_indices.npy"
    if damage == "no weights":
        values.unlink()
    elif damage.endswith("too few"):
        path, bytes_off = {"weight": (values, 4), "edge": (indices, 4), "byte": (values, 1)}[damage.split()[1]]
        path.write_bytes(path.read_bytes()[:-bytes_off])
    with pytest.raises(DataError, match=rf"archive.*{reason}"):
        convert(archive, tmp_path / "store", neighbours="knn", **ALLOWED)
    assert not (tmp_path / "store").exists()


def test_an_exported_graph_comes_back(described_with_graph, tmp_path):
    store, graph = described_with_graph
    export_scdl(store, tmp_path / "archive", "distances")
    assert np.fromfile(tmp_path / "archive/neighbor_indptr.npy", np.uint64).tolist() == graph.indptr.tolist()
    convert(tmp_path / "archive", tmp_path / "back", neighbours="distances", **ALLOWED)
    assert (CellStore.open(tmp_path / "back").neighbours("distances").rows(slice(None)) != graph).nnz == 0
    with pytest.raises(DataError, match="no graph 'knn'; there are distances"):
        export_scdl(store, tmp_path / "other", "knn")
    assert not (tmp_path / "other").exists()


@pytest.fixture
def described_with_graph(counts, made, save, tmp_path) -> tuple[CellStore, sp.csr_matrix]:
    """A store whose last cells came without a graph, and the graph of all."""
    data = made.anndata(counts)
    data.obsp["distances"] = kneighbors_graph(counts, 4, mode="distance").astype(np.float32)
    convert(save(data), tmp_path / "store", neighbours="distances", **ALLOWED)
    later = made.anndata(made.counts(20, 300, seed=3), name="later")
    convert(save(later, "b.h5ad"), tmp_path / "store", append=True, **ALLOWED)
    whole = sp.block_diag([data.obsp["distances"], sp.csr_matrix((20, 20), dtype=np.float32)], format="csr")
    return CellStore.open(tmp_path / "store"), whole


ORACLE = """
import sys, json, numpy as np
from bionemo.scdl.io.single_cell_memmap_dataset import SingleCellMemMapDataset
data = SingleCellMemMapDataset(sys.argv[1]) if len(sys.argv) == 2 else SingleCellMemMapDataset(
    sys.argv[1], h5ad_path=sys.argv[2], use_X_not_raw=True)
if len(sys.argv) > 2: data.save()
rows = [data.get_row(i, return_var_features=True) for i in range(len(data))]
print(json.dumps([[v.tolist(), c.tolist(), list(f[0][:3])] for (v, c), f, _ in rows]))
"""


@pytest.fixture
def python() -> str:
    """An interpreter that has bionemo-scdl."""
    python = os.environ.get("MEGACELL_SCDL_PYTHON")
    if not python:  # its archives, as established with it, are what the tests above are made after
        pytest.skip("no bionemo-scdl at hand: set MEGACELL_SCDL_PYTHON to an interpreter that has it")
    return python


NEIGHBOURS_ORACLE = """
import sys, json
from bionemo.scdl.io.single_cell_memmap_dataset import SingleCellMemMapDataset
own = {} if len(sys.argv) == 2 else {"h5ad_path": sys.argv[2], "neighbor_key": "distances", "use_X_not_raw": True}
data = SingleCellMemMapDataset(sys.argv[1], load_neighbors=True, **own)
if own: data.save()
print(json.dumps([[data.get_neighbor_indices_for_cell(i).tolist(), data.get_neighbor_weights_for_cell(i).tolist()]
                  for i in range(len(data))]))
"""


def test_bionemo_scdl_agrees_on_neighbours_both_ways(python, described_with_graph, save, tmp_path):
    store, graph = described_with_graph
    export_scdl(store, tmp_path / "ours", "distances")
    theirs = store.to_anndata()
    theirs.obsp["distances"] = graph
    theirs.var = pd.DataFrame({"gene_id": theirs.var_names}, index=theirs.var_names)
    command = [python, "-W", "ignore", "-c", NEIGHBOURS_ORACLE]
    for arguments in ([tmp_path / "ours"], [tmp_path / "theirs", save(theirs, "their.h5ad")]):
        said = subprocess.run([*command, *arguments], capture_output=True, text=True, check=True).stdout
        for cell, (ids, weights) in enumerate(json.loads(said)):
            row = slice(graph.indptr[cell], graph.indptr[cell + 1])
            assert (ids, weights) == (graph.indices[row].tolist(), graph.data[row].tolist())
    convert(tmp_path / "theirs", tmp_path / "back", neighbours="distances", **ALLOWED)
    assert (CellStore.open(tmp_path / "back").neighbours("distances").rows(slice(None)) != graph).nnz == 0


def test_bionemo_scdl_agrees_both_ways(python, described, counts, made, tmp_path):
    export_scdl(described, tmp_path / "ours")
    command = [python, "-W", "ignore", "-c", ORACLE]
    said = subprocess.run([*command, tmp_path / "ours"], capture_output=True, text=True, check=True).stdout
    expected = sp.csr_matrix(counts)
    for i, (values, columns, names) in enumerate(json.loads(said)):
        assert values == expected[i].data.tolist()
        assert columns == expected[i].indices.tolist()
        assert names == list(described.gene_ids[:3])
    theirs = made.anndata(sp.csr_matrix(counts))
    theirs.var = pd.DataFrame({"gene_id": theirs.var_names}, index=theirs.var_names)
    theirs.write_h5ad(tmp_path / "their.h5ad")
    subprocess.run([*command, tmp_path / "theirs", tmp_path / "their.h5ad"], capture_output=True, check=True)
    convert(tmp_path / "theirs", tmp_path / "back", **ALLOWED)
    np.testing.assert_array_equal(CellStore.open(tmp_path / "back").rows(slice(None)).toarray(), counts)
