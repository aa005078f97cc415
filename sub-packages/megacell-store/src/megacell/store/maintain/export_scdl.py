# SPDX-License-Identifier: Apache-2.0
"""A store written as an archive that bionemo-scdl 0.1.3 opens with the same values."""

import json
import os
import struct
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from megacell.core import lock
from megacell.core.errors import UsageError
from megacell.core.files import TEMPORARY, move_into_place, remove_tree
from megacell.store.read.cell_store import CellStore
from megacell.store.read.neighbours import Neighbours
from megacell.store.sources.scdl import NEIGHBOURS, TYPES

VERSION = "0.1.3"
_BLOCK = 4096  # cells written at a time
_NUMBER = {name: number for number, name in TYPES.items()}


def export_scdl(store: CellStore, out: str | os.PathLike[str], neighbours: str | None = None) -> None:
    """Write all cells of a store: counts as float32, one block of genes, the cells' names as `_index` beside their obs.

    Parameters
    ----------
    store : CellStore
    out : path-like
        The archive to make.
    neighbours : str, optional
        A graph of the store; its weights become float32.

    Raises
    ------
    DataError
        The store has no such graph.
    UsageError
        Something is at `out`, or the store holds no values or more cells than an archive's graph can number.
    """
    path = Path(out)
    graph = None if neighbours is None else store.neighbours(neighbours)
    if graph is not None and len(store) > 1 << 32:
        raise UsageError(f"{store.path}: {len(store):,} cells, an archive's graph numbers 2^32; leave --neighbours out")
    if path.exists():
        raise UsageError(f"{path}: exists already; give another --out")
    if not store.manifest.values:
        raise UsageError(f"{store.path}: holds no counts above zero, which bionemo-scdl cannot open")
    folder = path.with_name(path.name + TEMPORARY)
    path.parent.mkdir(parents=True, exist_ok=True)
    with lock.held(lock.beside(path), f"{path}: another export is writing here"):
        remove_tree(path.parent, folder.name)  # of one that was killed
        folder.mkdir()
        try:
            _fill(folder, store, graph)
        except Exception:
            remove_tree(path.parent, folder.name)
            raise
        move_into_place(folder, path)


def _fill(folder: Path, store: CellStore, graph: Neighbours | None) -> None:
    types = {"DATA": "float32", "ROWPTR": _smallest(store.manifest.values), "COLPTR": _smallest(store.shape[1] - 1)}
    names = {"DATA": "data.npy", "ROWPTR": "row_ptr.npy", "COLPTR": "col_ptr.npy"}
    files = {key: open(folder / name, "wb") for key, name in names.items()}  # noqa: SIM115 - closed below
    try:
        _write_rows(store, files, types)
    finally:
        for file in files.values():
            file.close()
    if graph is not None:
        _write_graph(folder, graph)
    (folder / "metadata.json").write_text(json.dumps({"num_rows": len(store)}))
    (folder / "version.json").write_text(json.dumps(VERSION))
    genes = {"gene_id": store.gene_ids, "symbol": store.symbols, "biotype": store.biotypes}
    _write_index(folder / "var_features", pa.table({k: pa.array(v, pa.string()) for k, v in genes.items()}), store)
    obs = store.obs.reset_index(names="_index")
    text = obs.select_dtypes(["category", "object", "string"]).columns
    obs[text] = obs[text].astype(object)  # its reader makes NumPy arrays of the columns, categories not among them
    _write_index(folder / "obs_features", pa.Table.from_pandas(obs, preserve_index=False), store)
    (folder / "header.sch").write_bytes(_header(store, types))


def _smallest(largest: int) -> str:
    return str(np.min_scalar_type(max(0, largest)))


def _write_rows(store: CellStore, files: Mapping[str, BinaryIO], types: dict[str, str]) -> None:
    written = 0
    files["ROWPTR"].write(np.zeros(1, types["ROWPTR"]).tobytes())
    for first in range(0, len(store), _BLOCK):
        indptr, genes, counts = store.gather(slice(first, first + _BLOCK))
        files["ROWPTR"].write((indptr[1:] + written).astype(types["ROWPTR"]).tobytes())
        files["COLPTR"].write(genes.astype(types["COLPTR"]).tobytes())
        files["DATA"].write(counts.astype(types["DATA"]).tobytes())
        written += int(indptr[-1])


def _write_graph(folder: Path, graph: Neighbours) -> None:
    """Write the edges of all cells; those that the graph does not reach have none."""
    written = 0
    with ExitStack() as stack:
        indptr, cells, weights = (stack.enter_context(open(folder / name, "wb")) for name in NEIGHBOURS)
        indptr.write(np.zeros(1, np.uint64).tobytes())
        for first in range(0, len(graph), _BLOCK):
            block = graph.rows(slice(first, first + _BLOCK))
            indptr.write((block.indptr[1:].astype(np.uint64) + np.uint64(written)).tobytes())
            cells.write(block.indices.astype(np.uint32).tobytes())
            weights.write(block.data.astype(np.float32).tobytes())
            written += block.nnz


def _write_index(folder: Path, table: pa.Table, store: CellStore) -> None:
    """Write an index of one block; labels for this version and, without pickles, for later ones."""
    folder.mkdir()
    pq.write_table(table, folder / "dataframe_0.parquet")
    label = store.path.name
    np.save(folder / "cumulative_sum_index.npy", np.array([-1, len(store)], np.int64))
    np.save(folder / "labels.npy", np.array([label]))
    (folder / "labels.json").write_text(json.dumps([label]))
    np.save(folder / "version.npy", np.array(VERSION))


def _header(store: CellStore, types: dict[str, str]) -> bytes:
    lengths = {"DATA": store.manifest.values, "ROWPTR": len(store) + 1, "COLPTR": store.manifest.values}
    parts: list[Any] = [b"SCDL", struct.pack(">BBBBII", 0, 1, 0, 1, 1, len(lengths))]
    for name, length in lengths.items():
        parts += [_text(name), struct.pack(">QIB", length, _NUMBER[types[name]], 0)]
    parts.append(struct.pack(">I", 2))
    for name in ("var_features", "obs_features"):
        files = ("cumulative_sum_index.npy", "labels.npy", "version.npy", "dataframe_0.parquet")
        parts += [_text(name), struct.pack(">QII", len(store), 8, len(files))]
        parts += [_text(f"{name}/{file}") for file in files] + [b"\0"]
    return b"".join(parts)


def _text(text: str) -> bytes:
    return struct.pack(">I", len(text.encode())) + text.encode()
