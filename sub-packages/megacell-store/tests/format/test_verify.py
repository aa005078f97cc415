# SPDX-License-Identifier: Apache-2.0
"""Any damage to a store is found and named."""

import shutil

import numpy as np
import pytest
from sklearn.neighbors import kneighbors_graph

from megacell.core.errors import DataError
from megacell.store import CellStore, compact, convert
from megacell.store.format.verify import verify

ALLOWED = {"allow_subset": True}


@pytest.fixture
def store(counts, made, save, tmp_path):
    """A store of several shards and three generations, each of which has files that the others lack."""
    data = made.anndata(counts)
    data.obsp["distances"] = kneighbors_graph(counts, 3, mode="distance")
    convert(save(data, "a.h5ad"), tmp_path / "store", shard_bytes=10_000, neighbours="distances", **ALLOWED)
    convert(save(made.counts(20, 200, seed=5), "b.h5ad"), tmp_path / "store", append=True, **ALLOWED)
    compact(tmp_path / "store")
    return tmp_path / "store"


def damages(store) -> list[str]:
    try:
        return verify(store).damages
    except DataError as error:
        return [str(error)]


def test_a_whole_store_is_found_whole(store):
    found = verify(store)
    assert found.damages == []
    assert found.files == sum(path.is_file() for path in store.rglob("*"))


def test_a_flipped_bit_anywhere_is_found_and_its_file_named(store):
    random = np.random.default_rng(0)
    for path in sorted(p for p in store.rglob("*") if p.is_file()):
        content = path.read_bytes()
        for position in {0, len(content) - 1, *random.integers(0, len(content), 6).tolist()}:
            damaged = bytearray(content)
            damaged[position] ^= 1 << int(random.integers(8))
            path.write_bytes(bytes(damaged))
            found = damages(store)
            assert found, f"{path.name}: the flip at {position} was missed"
            assert any(str(path) in line or "manifest.json" in line for line in found)
        path.write_bytes(content)
    assert damages(store) == []


@pytest.mark.exhaustive
def test_every_flipped_byte_is_found(store):
    for path in sorted(p for p in store.rglob("*") if p.is_file()):
        content = path.read_bytes()
        for position in range(len(content)):
            path.write_bytes(content[:position] + bytes([content[position] ^ 0xFF]) + content[position + 1 :])
            assert damages(store)
        path.write_bytes(content)


@pytest.mark.parametrize(
    "name",
    [
        *("shards/00000/counts.npy", "genes-2.parquet", "panels-1.parquet", "manifest-1.json", "manifest-3.json"),
        *("neighbours/distances-1/weights.npy", "shards/00004/obs.parquet"),
    ],
)
def test_missing_truncated_and_swapped_files_are_named(store, name):
    path = store / name
    content = path.read_bytes()
    path.unlink()
    assert any(str(path) in line and "missing" in line for line in damages(store))
    path.write_bytes(content[:-1])
    assert any(str(path) in line for line in damages(store))
    path.write_bytes(content)
    assert damages(store) == []


def test_two_shards_in_each_others_place_are_found(store):
    first, second = store / "shards/00000", store / "shards/00001"
    shutil.move(first, store / "aside")
    shutil.move(second, first)
    shutil.move(store / "aside", second)
    assert damages(store)
    with pytest.raises(DataError):
        CellStore.open(store, generation=2).rows(slice(None))
