# SPDX-License-Identifier: Apache-2.0
"""Made cells, written as each format of the sources has them."""

import gzip
from typing import Any

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

from megacell.store.format import blocks
from megacell.store.sources import layouts


def small_blocks(patch: pytest.MonkeyPatch, values: int, rows: int = blocks.ROWS) -> None:
    """Have sources read in blocks of at most so many values and rows, so that a few cells are several."""
    for module in (blocks, layouts):
        patch.setattr(module, "VALUES", values)
        patch.setattr(module, "ROWS", rows)


def make_counts(cells: int, genes: int, seed: int = 0, depth: float = 3000.0) -> np.ndarray:
    """Whole counts whose totals spread as real ones do: float32 [cells, genes]."""
    random = np.random.default_rng(seed)
    share = random.lognormal(0, 2, genes)
    totals = depth * random.lognormal(0, 0.5, cells)
    return random.poisson(totals[:, None] * (share / share.sum())[None]).astype(np.float32)


def make_anndata(
    counts: Any, *, first_gene: int = 0, prefix: str = "ENSG", obs: pd.DataFrame | None = None, name: str = "cell"
) -> ad.AnnData:
    """AnnData with Ensembl ids as index and symbols beside."""
    numbers = range(first_gene, first_gene + counts.shape[1])
    var = pd.DataFrame({"feature_name": [f"GENE{i}" for i in numbers]}, index=[f"{prefix}{i:011d}" for i in numbers])
    if obs is None:
        obs = pd.DataFrame(index=[f"{name}-{i}" for i in range(counts.shape[0])])
    return ad.AnnData(counts, obs=obs, var=var)


def write_loom(path, counts, ids, *, chunk=None):
    with h5py.File(path, "w") as file:
        file.create_dataset("matrix", data=counts.T, chunks=chunk and tuple(map(min, chunk, counts.T.shape)))
        file["row_attrs/ensembl_id"] = np.array(ids, "S")
        file["col_attrs/CellID"] = np.array([f"cell-{i}" for i in range(len(counts))], "S")
        file["col_attrs/n_counts"] = counts.sum(1)
        file["col_attrs/filter_pass"] = np.ones(len(counts), np.int64)
        file.create_group("layers")


def write_tenx_h5(path, counts, ids, *, version=3):
    rows = sp.csr_matrix(counts.astype(np.int32))
    with h5py.File(path, "w") as file:
        group = file.create_group("matrix" if version == 3 else "GRCh38")
        for name in ("data", "indices", "indptr"):
            group[name] = getattr(rows, name)
        group["shape"] = np.array(counts.shape[::-1])
        group["barcodes"] = np.array([f"cell-{i}" for i in range(len(counts))], "S")
        names = np.array([f"GENE{i}" for i in range(len(ids))], "S")
        if version == 3:
            group["features/id"], group["features/name"] = np.array(ids, "S"), names
            group["features/feature_type"] = np.array([b"Gene Expression"] * len(ids))
        else:
            group["genes"], group["gene_names"] = np.array(ids, "S"), names


def write_mtx(folder, counts, ids, *, zipped=True, order=None):
    folder.mkdir()
    coo = sp.coo_matrix(counts.T.astype(np.int64))
    order = np.arange(coo.nnz) if order is None else order(coo.nnz)
    lines = ["%%MatrixMarket matrix coordinate integer general", "%made", f"{coo.shape[0]} {coo.shape[1]} {coo.nnz}"]
    lines += [f"{coo.row[k] + 1} {coo.col[k] + 1} {coo.data[k]}" for k in order]
    parts = {
        "matrix.mtx": lines,
        "features.tsv" if zipped else "genes.tsv": [f"{g}\tGENE{i}" for i, g in enumerate(ids)],
        "barcodes.tsv": [f"cell-{i}" for i in range(len(counts))],
    }
    for name, own in parts.items():
        text = "\n".join([*own, ""]).encode()
        (folder / (name + ".gz" * zipped)).write_bytes(gzip.compress(text) if zipped else text)


def write_h5mu(path, data):
    data.write_h5ad(path)
    with h5py.File(path, "r+") as file:
        file.create_group("mod/rna")
        for name in list(file):
            if name != "mod":
                file.move(name, f"mod/rna/{name}")
        file.create_group("mod/prot")


def write_zarr(path, data, version):
    data.obs["kind"] = pd.Categorical(["a", "b"] * (len(data) // 2))
    before = ad.settings.zarr_write_format
    ad.settings.zarr_write_format = version
    try:
        data.write_zarr(path)
    finally:
        ad.settings.zarr_write_format = before


FORMATS = {
    "loom": lambda path, counts, ids, data: write_loom(path / "f.loom", counts, ids),
    "loom in chunks": lambda path, counts, ids, data: write_loom(path / "f.loom", counts, ids, chunk=(64, 7)),
    "10x h5 v3": lambda path, counts, ids, data: write_tenx_h5(path / "f.h5", counts, ids),
    "10x h5 v2": lambda path, counts, ids, data: write_tenx_h5(path / "f.h5", counts, ids, version=2),
    "mtx": lambda path, counts, ids, data: write_mtx(path / "sample", counts, ids),
    "mtx of old, plain": lambda path, counts, ids, data: write_mtx(path / "sample", counts, ids, zipped=False),
    "mtx in any order": lambda path, counts, ids, data: write_mtx(
        path / "sample", counts, ids, order=np.random.default_rng(0).permutation
    ),
    "h5mu": lambda path, counts, ids, data: write_h5mu(path / "f.h5mu", data),
    "zarr v2, dense": lambda path, counts, ids, data: write_zarr(path / "f.zarr", data, 2),
    "zarr v3, csr": lambda path, counts, ids, data: write_zarr(path / "f.zarr", sparse(data, sp.csr_matrix), 3),
    "zarr v2, csc": lambda path, counts, ids, data: write_zarr(path / "f.zarr", sparse(data, sp.csc_matrix), 2),
}


def sparse(data, kind):
    data.X = kind(data.X)
    return data
