# SPDX-License-Identifier: Apache-2.0
"""Reading a store: generations, pickling, damaged manifests, cells that are not there, duplicates."""

import json
import pickle
import shutil
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import get_context

import anndata as ad
import numpy as np
import pytest
import xxhash
from sklearn.neighbors import kneighbors_graph

from megacell.core.errors import DataError, UsageError
from megacell.store import CellStore, convert
from megacell.store.format.manifest import Manifest

ALLOWED = {"allow_subset": True}


@pytest.fixture
def store(counts, save, tmp_path) -> CellStore:
    convert(save(counts, "first.h5ad"), tmp_path / "store", **ALLOWED)
    return CellStore.open(tmp_path / "store")


def test_a_store_says_what_it_holds(store, counts):
    assert len(store) == 60
    assert store.shape == (60, 300)
    assert store.generation == 1
    assert store.digest == xxhash.xxh3_64_hexdigest((store.path / "manifest.json").read_bytes())
    assert store.symbols[7] == "GENE7"
    source = store.sources[0]
    assert (source.name, source.kind, source.matrix, source.genes) == ("first", "umi", "X", 300)
    assert store.source_of.dtype == np.uint32
    assert store.panel(0).dtype == np.uint32


@pytest.mark.parametrize("indices", [[60], [-1], [0, 5, 10**12]])
def test_a_cell_that_is_not_there_is_an_error(store, indices):
    with pytest.raises(DataError, match=r"no cell (60|-1|1000000000000); there are 60"):
        store.rows(indices)


@pytest.mark.parametrize("indices", [[0.5], [[1, 2]], np.ones(59, bool), ["a"]])
def test_what_is_no_list_of_cells_is_an_error(store, indices):
    with pytest.raises(DataError):
        store.rows(indices)


def test_masks_and_slices_are_cells_too(store, counts):
    mask = np.arange(60) % 7 == 0
    np.testing.assert_array_equal(store.rows(mask).toarray(), counts[mask])
    np.testing.assert_array_equal(store.rows(slice(50, 10, -3)).toarray(), counts[50:10:-3])
    assert store.rows([]).shape == (0, 300)


def test_anndata_of_some_cells(store, counts):
    data = store.to_anndata([5, 3])
    assert isinstance(data, ad.AnnData)
    np.testing.assert_array_equal(data.X.toarray(), counts[[5, 3]])
    assert list(data.obs_names) == ["cell-5", "cell-3"]
    assert data.var["symbol"].iloc[0] == "GENE0"


def test_readers_stay_on_the_generation_they_opened(store, counts, made, save):
    old = pickle.dumps(store)
    later = made.counts(40, 350, seed=9)
    report = convert(save(later, "second.h5ad"), store.path, append=True, **ALLOWED)
    assert (report.generation, report.cells, report.genes) == (2, 100, 350)
    for reader in (store, pickle.loads(old), CellStore.open(store.path, generation=1)):  # our own bytes
        assert (reader.generation, reader.shape, reader.digest) == (1, (60, 300), store.digest)
        np.testing.assert_array_equal(reader.rows(slice(None)).toarray(), counts)
        assert len(reader.obs) == 60
    new = CellStore.open(store.path)
    assert list(new.gene_ids[:300]) == list(store.gene_ids)
    np.testing.assert_array_equal(new.rows(np.arange(60, 100)).toarray(), later)
    assert new.source_of.tolist() == [0] * 60 + [1] * 40
    with pytest.raises(DataError, match="holds no generation 3; its newest is 2"):
        CellStore.open(store.path, generation=3)


def total(store: CellStore, cells: list[int]) -> float:
    return float(store.rows(cells).sum())


def test_spawned_workers_and_threads_read_the_same(store, counts):
    assert len(pickle.dumps(store)) < 1000
    parts = [list(range(i, 60, 3)) for i in range(3)]
    expected = [counts[part].sum() for part in parts]
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        assert list(pool.map(total, [store] * 3, parts)) == expected
    with ThreadPoolExecutor(3) as pool:
        assert list(pool.map(lambda part: total(store, part), parts)) == expected


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda text: text[: len(text) // 2], "not readable as JSON"),
        (lambda text: b"", "not readable as JSON"),
        (lambda text: b"[]\n", "not the manifest of a cell store"),
        (lambda text: b"{" * 100_000, "not readable as JSON"),
        (lambda text: text.replace(b'"cells": 60', b'"cells": 61'), "wrong checksum"),
        (lambda text: text.replace(b'"version": 1', b'"version": 2'), "format version 2, this megacell reads up to 1"),
        (lambda text: text.replace(b'"megacell-store"', b'"other"'), "not the manifest of a cell store"),
        (lambda text: signed(text, cells="many"), "malformed"),
        (lambda text: signed(text, shards=None), "malformed"),
        (lambda text: signed(text, genes_file="../../etc/passwd"), "malformed"),
        (lambda text: signed(text, generation=0), "malformed"),
    ],
    ids=[
        "cut in half",
        "empty",
        "a list",
        "nested deeply",
        "a changed number",
        "a newer version",
        "another format",
        "text for a number",
        "no shards",
        "a path that leads out",
        "generation zero",
    ],
)
def test_a_damaged_manifest_is_refused_by_reason(store, damage, reason):
    path = store.path / "manifest.json"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(DataError, match=rf"manifest\.json: .*{reason}"):
        CellStore.open(store.path)


def signed(text: bytes, **changed) -> bytes:
    """Change a manifest's members and sign it again, as docs/format.md says."""
    content = {**json.loads(text), **changed, "checksum": "0" * 16}
    unsigned = json.dumps(content).encode()
    head, _, tail = unsigned.rpartition(b'"checksum": "' + b"0" * 16)
    return head + f'"checksum": "{xxhash.xxh3_64_hexdigest(unsigned)}'.encode() + tail


def test_members_that_version_1_does_not_know_are_left_alone(store):
    path = store.path / "manifest.json"
    path.write_bytes(signed(path.read_bytes(), later_addition={"a": 1}))
    assert len(CellStore.open(store.path)) == 60


def test_what_is_no_store_is_refused(tmp_path):
    for path in (tmp_path, tmp_path / "absent"):
        with pytest.raises(DataError, match="not a cell store"):
            CellStore.open(path)


@pytest.mark.parametrize("name", ["indptr.npy", "indices.npy", "counts.npy", "overflow_values.npy"])
def test_a_truncated_or_missing_array_is_found_before_it_is_read(store, name):
    path = store.path / "shards/00000" / name
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(DataError, match=rf"{name}.*bytes, should be"):
        CellStore.open(store.path).rows([0])
    path.unlink()
    with pytest.raises(DataError, match=rf"{name}.*cannot be read"):
        CellStore.open(store.path).rows([0])


@pytest.mark.parametrize(
    ("name", "position", "value"), [("indptr", 5, 2**40), ("indptr", 5, -3), ("indices", 3, 65535)]
)
def test_numbers_that_lead_astray_are_an_error_and_no_crash(store, name, position, value):
    path = store.path / f"shards/00000/{name}.npy"
    array = np.load(path)
    array[position] = value
    np.save(path, array)
    assert path.stat().st_size == 128 + array.nbytes  # as before: only the number changed
    with pytest.raises(DataError, match="damaged; run `megacell verify"):
        CellStore.open(store.path).rows(np.arange(60))


def test_nothing_in_a_store_is_writable_through_its_reader(store):
    with pytest.raises(ValueError, match="read-only"):
        store.source_of[0] = 1


def test_duplicates_are_reported_by_pair_of_sources(counts, made, save, tmp_path):
    other = made.counts(30, 300, seed=4)
    a = save(np.vstack([counts, counts[:3]]), "a.h5ad")
    b = made.anndata(np.vstack([other, counts[10:15]]), name="b")
    b = b[:, ::-1].copy()  # the same cells with the genes in another order
    report = convert([a, save(b, "b.h5ad")], tmp_path / "store", **ALLOWED)
    assert [(d.first, d.second, d.cells) for d in report.duplicates] == [("a", "a", 3), ("a", "b", 5)]
    report = convert(save(counts[:7], "c.h5ad"), tmp_path / "store", append=True, **ALLOWED)
    assert [(d.first, d.second, d.cells) for d in report.duplicates] == [("a", "c", 7)]


def test_a_cells_hash_depends_on_nothing_but_its_genes_and_counts(counts, made, save, tmp_path):
    convert(save(counts, "a.h5ad"), tmp_path / "one", **ALLOWED)
    convert(
        [save(made.counts(9, 200, seed=8), "z.h5ad", first_gene=200), tmp_path / "a.h5ad"], tmp_path / "two", **ALLOWED
    )
    one, two = CellStore.open(tmp_path / "one"), CellStore.open(tmp_path / "two")
    np.testing.assert_array_equal(one.cell_hash, two.cell_hash[9:])
    assert len(set(one.cell_hash.tolist())) == 60


def test_a_cells_hash_is_what_the_format_says(store, counts):
    mask = (1 << 64) - 1
    total = 0
    for gene, count in zip(store.gene_ids, counts[3], strict=True):
        if count:
            bits = int(np.float64(count).view(np.uint64))
            x = xxhash.xxh3_64_intdigest(gene.encode()) ^ (bits * 0x9E3779B97F4A7C15 & mask)
            x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & mask
            x = (x ^ (x >> 27)) * 0x94D049BB133111EB & mask
            total = (total + (x ^ (x >> 31))) & mask
    assert int(store.cell_hash[3]) == total


def test_cells_without_counts_are_kept_and_are_no_copies_of_each_other(counts, save, tmp_path):
    counts[[4, 17, 59]] = 0
    report = convert(save(counts), tmp_path / "store", **ALLOWED)
    assert report.duplicates == []
    np.testing.assert_array_equal(CellStore.open(tmp_path / "store").rows(slice(None)).toarray(), counts)


def test_the_same_file_is_not_added_twice(store, counts, save, tmp_path):
    with pytest.raises(DataError, match=r"first\.h5ad: the same bytes as source 'first' of the store"):
        convert(tmp_path / "first.h5ad", store.path, append=True, **ALLOWED)
    shutil.copy(tmp_path / "first.h5ad", tmp_path / "copy.h5ad")
    with pytest.raises(DataError, match="the same bytes as"):
        convert([tmp_path / "first.h5ad", tmp_path / "copy.h5ad"], tmp_path / "other", **ALLOWED)
    assert not (tmp_path / "other").exists()
    assert Manifest.open(store.path).generation == 1


def test_files_of_equal_names_are_told_apart_by_their_folders(made, tmp_path):
    for sample in ("one", "two"):
        (tmp_path / "in" / sample).mkdir(parents=True)
        data = made.anndata(made.counts(30, 300, seed=len(sample) + ord(sample[0])))
        data.write_h5ad(tmp_path / "in" / sample / "filtered.h5ad")
    convert(tmp_path / "in", tmp_path / "store", **ALLOWED)
    assert [s.name for s in CellStore.open(tmp_path / "store").sources] == ["one/filtered", "two/filtered"]


def test_large_files_are_split_and_workers_make_the_same_store(made, save, tmp_path):
    cells = [made.anndata(made.counts(60, 300, seed=i)) for i in range(3)]
    for data in cells:
        data.obsp["distances"] = kneighbors_graph(data.X, 5, mode="distance")
    files = [save(data, f"f{i}.h5ad") for i, data in enumerate(cells)]
    convert(files, tmp_path / "one", shard_bytes=20_000, neighbours="distances", **ALLOWED)
    convert(files, tmp_path / "two", shard_bytes=20_000, neighbours="distances", workers=2, **ALLOWED)
    one, two = CellStore.open(tmp_path / "one"), CellStore.open(tmp_path / "two")
    assert len(one.manifest.shards) > 3
    assert one.digest == two.digest
    expected = np.vstack([made.counts(60, 300, seed=i) for i in range(3)])
    np.testing.assert_array_equal(one.rows(slice(None)).toarray(), expected)
    assert one.obs.index.tolist() == [f"cell-{i}" for i in range(60)] * 3


def test_an_output_that_exists_is_wrong_usage(store, tmp_path):
    with pytest.raises(UsageError, match="exists already; --append adds to it"):
        convert(tmp_path / "first.h5ad", store.path, **ALLOWED)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("precious")
    with pytest.raises(UsageError, match="exists already and is not an unfinished store"):
        convert(tmp_path / "first.h5ad", tmp_path / "mine", **ALLOWED)
    with pytest.raises(UsageError, match="no store to append to"):
        convert(tmp_path / "first.h5ad", tmp_path / "absent", append=True, **ALLOWED)
    assert (tmp_path / "mine" / "thesis.tex").read_text() == "precious"


def test_the_package_imports_no_torch_and_nothing_slow():
    code = "import sys, megacell.store, megacell.store.commands.register; print([m for m in sys.modules if m in %r])"
    slow = ["torch", "numba", "numpy", "pandas", "anndata", "h5py", "pyarrow", "scipy", "rich"]
    answer = subprocess.run([sys.executable, "-c", code % slow], capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == "[]"
    whole = (
        "import sys; from megacell.store.conversion import conversion\n"
        "from megacell.store.sampling import batch_stream; print('torch' in sys.modules)"
    )
    answer = subprocess.run([sys.executable, "-c", whole], capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == "False"
