# SPDX-License-Identifier: Apache-2.0
"""A store of 100 million cells from 10,000 sources whose arrays are holes in files: what opening it costs is real.

The manifest, the tables and the row pointers are written by Megacell's own functions and hold what a real store's hold;
gene numbers and counts are sparse files, which read as zeros. Shards share one table of metadata and one of pointers by
hard links.
"""

import os
from pathlib import Path

import numpy as np
import pandas as pd
import xxhash

from megacell.store.format.gene_table import GeneTable
from megacell.store.format.manifest import FileRecord, Manifest, ObsColumn, ShardRecord, Source
from megacell.store.format.obs import ObsWriter
from megacell.store.format.panels import PanelWriter
from megacell.store.format.shard import FOLDER, OBS, ArrayWriter

CELLS, SOURCES, SHARDS, GENES, VALUES_A_CELL, PANELS = 100_000_000, 10_000, 250, 60_000, 1_490, 100
OBS_COLUMNS = [ObsColumn("cell_type", "category", tuple(f"type {i}" for i in range(500))), ObsColumn("age", "integer")]


def make_large_store(store: Path) -> None:
    """Write the store to a folder that does not exist yet."""
    cells = CELLS // SHARDS
    (store / FOLDER).mkdir(parents=True)
    shared = _shared_files(store / FOLDER, cells)
    shards = [_shard(store / FOLDER, f"{number:05d}", cells, shared) for number in range(SHARDS)]
    ids = [f"ENSG{gene:011d}" for gene in range(GENES)]
    GeneTable(ids, [f"GENE{gene}" for gene in range(GENES)], [""] * GENES).write(store / "genes-1.parquet")
    random = np.random.default_rng(0)
    with PanelWriter(store / "panels-1.parquet") as panels:
        for _ in range(PANELS):
            panels.add(np.sort(random.choice(GENES, 30_000, replace=False)).astype(np.uint32))
    files = {name: FileRecord.of(store / name) for name in ("genes-1.parquet", "panels-1.parquet")}
    Manifest(
        generation=1, species="human", cells=CELLS, genes=GENES, values=CELLS * VALUES_A_CELL, files=files,
        genes_file="genes-1.parquet", panels_file="panels-1.parquet", shards=tuple(shards),
        sources=tuple(_source(number) for number in range(SOURCES)), obs=tuple(OBS_COLUMNS),
    ).commit(store)  # fmt: skip
    for path in (store / FOLDER).glob("*.shared"):
        path.unlink()


def _shared_files(folder: Path, cells: int) -> dict[str, FileRecord]:
    """Write the files that are the same in all shards."""
    arrays = {"indptr": np.arange(cells + 1, dtype=np.int64) * VALUES_A_CELL}
    arrays |= {"overflow_positions": np.zeros(0, np.int64), "overflow_values": np.zeros(0, np.uint32)}
    files = {}
    for name, array in arrays.items():
        numbers = ArrayWriter(folder / f"{name}.npy.shared", array.dtype.name)
        numbers.append(array)
        files[f"{name}.npy"] = numbers.close()
    types = pd.Categorical([f"type {i % 500}" for i in range(cells)])
    names = pd.Index([f"cell-{i}" for i in range(cells)], dtype=object)
    obs = pd.DataFrame({"cell_type": types, "age": np.arange(cells) % 90}, index=names)
    writer = ObsWriter(folder / f"{OBS}.shared", OBS_COLUMNS)
    writer.add(obs)
    return files | {OBS: writer.close()}


def _shard(folder: Path, name: str, cells: int, shared: dict[str, FileRecord]) -> ShardRecord:
    (folder / name).mkdir()
    for file in shared:
        os.link(folder / f"{file}.shared", folder / name / file)
    files, values = dict(shared), cells * VALUES_A_CELL
    lengths = {"indices": ("uint16", values), "counts": ("uint8", values)}
    lengths |= {"cell_hash": ("uint64", cells), "panels": ("uint32", cells)}
    for array, (dtype, length) in lengths.items():
        path = folder / name / f"{array}.npy"
        np.lib.format.open_memmap(path, "w+", np.dtype(dtype), (length,))
        files[f"{array}.npy"] = FileRecord(path.stat().st_size, "0" * 16, dtype, (length,))
    return ShardRecord(name, cells, values, dict(sorted(files.items())))


def _source(number: int) -> Source:
    digest = xxhash.xxh3_64_hexdigest(str(number).encode())
    return Source(
        name=f"dataset {number}", file=f"{digest}.h5ad", format="h5ad", size=10**9 + number, hash=digest,
        rows=CELLS // SOURCES, cells=CELLS // SOURCES, kind="umi", matrix="raw", ids="ensembl", genes=30_000,
        panel=number % PANELS, subset=False, species="human",
        notes=("12 features that are no genes dropped", "3 genes with several columns summed"),
    )  # fmt: skip
