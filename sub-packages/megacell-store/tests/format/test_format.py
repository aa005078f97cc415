# SPDX-License-Identifier: Apache-2.0
"""Version 1 of the format does not change: a fixed store's arrays, bit for bit, and the page that describes them."""

import json
import textwrap
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from sklearn.neighbors import kneighbors_graph

from megacell.store import CellStore, convert
from megacell.store.format.manifest import Manifest

DOCUMENT = Path(__file__).resolve().parents[4] / "docs" / "format.md"


@pytest.fixture
def store(made, save, tmp_path) -> CellStore:
    """Counts by arithmetic, in which every array of the format has something to say."""
    cell, gene = np.arange(40)[:, None], np.arange(50)[None]
    counts = ((cell * 7 + gene * 3) % 11 % 4 * (1 + cell % 3)).astype(np.float32)
    counts[::4, 3], counts[1, 1] = 1, 100_000
    obs = pd.DataFrame({"donor_id": pd.Categorical(["a", "b"] * 20)}, index=[f"cell-{i}" for i in range(40)])
    files = [save(made.anndata(counts, obs=obs), "a.h5ad"), save(counts[::-1, :30].copy(), "b.h5ad", first_gene=25)]
    convert(files, tmp_path / "store", allow_subset=True, allow_low_counts=True)
    return CellStore.open(tmp_path / "store")


def test_the_arrays_of_version_1_stay_as_they_are(store):
    files = store.manifest.shards[0].files
    assert {name: (record.dtype, record.xxh3) for name, record in files.items() if record.dtype} == {
        "cell_hash.npy": ("uint64", "0cafb264581f2f37"),
        "counts.npy": ("uint8", "dab971f54f87079f"),
        "indices.npy": ("uint16", "708cf65333090f72"),
        "indptr.npy": ("int64", "8425802fedd1586f"),
        "overflow_positions.npy": ("int64", "f3cad182b391d161"),
        "overflow_values.npy": ("uint32", "b5bb49d7eb838916"),
        "panels.npy": ("uint32", "e747313dd67dfd02"),
    }


def test_the_manifest_of_version_1_has_these_members(store):
    content = json.loads((store.path / "manifest.json").read_bytes())
    assert list(content) == [
        "format",
        "version",
        "generation",
        "species",
        "cells",
        "genes",
        "values",
        "files",
        "genes_file",
        "panels_file",
        "shards",
        "sources",
        "obs",
        "earlier",
        "neighbours",
        "checksum",
    ]
    described = DOCUMENT.read_text()
    parts = [content["shards"][0], content["sources"][0], content["obs"][0], content["files"]["genes-1.parquet"]]
    members = [*content, *(name for part in parts for name in part)]
    assert [name for name in members if f"`{name}`" not in described and f'"{name}"' not in described] == []
    assert Manifest.loads((store.path / "manifest.json").read_bytes(), store.path) == store.manifest


def documented(first_line: str) -> str:
    """Return the program in the document that begins so."""
    code = DOCUMENT.read_text().partition(f"    {first_line}")
    lines = (code[1] + code[2]).splitlines()
    return textwrap.dedent("\n".join(lines[: lines.index("", 1)]))


def test_the_reader_in_the_document_reads_a_store(store, monkeypatch):
    program = documented("import json, numpy")
    found: dict = {}
    (store.path.parent / "STORE").symlink_to(store.path)
    monkeypatch.chdir(store.path.parent)
    for cell in (0, 1, 39, 79):
        exec(program.replace("indptr[0], indptr[1]", f"indptr[{cell}], indptr[{cell} + 1]"), found)
        row = store.rows([cell])
        assert found["cell"] == dict(zip(store.gene_ids[row.indices], row.data, strict=True))


def test_the_reader_of_graphs_in_the_document_reads_one(made, save, tmp_path, monkeypatch):
    data = made.anndata(made.counts(30, 300, seed=1))
    data.obsp["connectivities"] = kneighbors_graph(data.X, 4, mode="distance").astype(np.float32)
    convert(save(data), tmp_path / "STORE", neighbours="connectivities", allow_subset=True)
    later = save(made.counts(10, 300, seed=2), "later.h5ad")
    convert(later, tmp_path / "STORE", append=True, allow_subset=True)
    graph = CellStore.open(tmp_path / "STORE").neighbours("connectivities")
    monkeypatch.chdir(tmp_path)
    found: dict = {"numpy": np, "manifest": json.loads((tmp_path / "STORE/manifest.json").read_bytes())}
    program = documented('folder = "STORE/neighbours/')
    for cell in (0, 29, 35):
        exec(program.replace("cell = 0", f"cell = {cell}"), found)
        assert found["neighbours"] == dict(zip(*graph.of(cell), strict=True))
