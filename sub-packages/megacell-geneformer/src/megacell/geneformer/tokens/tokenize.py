# SPDX-License-Identifier: Apache-2.0
"""A store's cells as a Hugging Face `datasets` directory, as Geneformer's own scripts load it. Streamed and resumable.

The layout is that of ``Dataset.save_to_disk``: Arrow stream files, ``dataset_info.json`` and ``state.json``. Files are
made one by one in a folder beside the place, each renamed when it is whole; a run that was killed goes on at the first
that is missing. Cells stand in the store's order; those without a known gene are left out.
"""

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa

from megacell.core import lock
from megacell.core.files import TEMPORARY, flush_file, move_into_place
from megacell.geneformer.tokens.lengths import token_lengths
from megacell.geneformer.tokens.rank_encoder import RankEncoder
from megacell.geneformer.vocabulary.vocabulary import Vocabulary, check_coverage, refuse_existing
from megacell.store import CellStore

CELLS_A_FILE = 1 << 16
CELLS_AT_ONCE = 1000  # a record batch, as many as `datasets` writes
TOKENS, LENGTH, CELL = "input_ids", "length", "cell"
PLAN = "plan.json"  # of an unfinished directory: what it is made from


def tokenize(
    store: CellStore,
    vocabulary: Vocabulary,
    out: Path,
    *,
    max_length: int | None = None,
    allow_low_coverage: bool = False,
    cells_a_file: int = CELLS_A_FILE,
) -> list[str]:
    """Write a store's cells as tokens.

    Columns: ``input_ids`` (int32, specials included), ``length``, the columns of obs, and ``cell``, the number in the
    store.

    Parameters
    ----------
    store : CellStore
    vocabulary : Vocabulary
    out : Path
        Directory to make.
    max_length : int, optional
        Longest cell in tokens, specials included; the vocabulary's own by default.
    allow_low_coverage : bool, default False
        Take a store that measures under a quarter of the vocabulary's genes.
    cells_a_file : int
        Cells of the store whose tokens are one file's.

    Returns
    -------
    list of str
        What was done, for the log.

    Raises
    ------
    UsageError
        ``out`` exists.
    DataError
        Store and vocabulary do not fit, or another process is writing ``out``.
    """
    refuse_existing(out)
    check_coverage(store.gene_ids, store.symbols, vocabulary, str(store.path), allow=allow_low_coverage)
    encoder = RankEncoder(store.gene_ids, store.symbols, vocabulary, max_length)
    out.parent.mkdir(parents=True, exist_ok=True)
    with lock.held(lock.beside(out), f"{out}: another process is writing it"):
        refuse_existing(out)  # again: the other one may have ended between
        return _write_all(store, encoder, out, cells_a_file)


def _write_all(store: CellStore, encoder: RankEncoder, out: Path, cells_a_file: int) -> list[str]:
    """Write all files, and give the directory its name; return what was done."""
    vocabulary = encoder.vocabulary
    plan = {"store": store.digest, "vocabulary": vocabulary.hash, "max_length": encoder.max_length}
    work = out.with_name(f".{out.name}.unfinished")
    done = _take_up(work, {**plan, "cells_a_file": cells_a_file})
    lengths, written = token_lengths(store, vocabulary), 0
    firsts = range(0, len(store), cells_a_file)
    for number, first in enumerate(firsts):
        cells = first + np.flatnonzero(lengths[first : first + cells_a_file])
        written += len(cells)
        place = work / f"{number:05d}.arrow"
        if not place.exists():
            _write(place, store, encoder, cells)
    names = [f"data-{number:05d}-of-{len(firsts):05d}.arrow" for number in range(len(firsts))]
    for number, name in enumerate(names):
        (work / f"{number:05d}.arrow").rename(work / name)
    _describe(work, names, _schema(store), json.dumps(plan, sort_keys=True))
    (work / PLAN).unlink()
    move_into_place(work, out)
    lines = [f"{out}: {written:,} cells in {len(names)} files, at most {encoder.max_length:,} tokens each"]
    if left_out := len(store) - written:
        lines.append(f"{left_out:,} cells have no gene of the vocabulary and are left out")
    return lines + ([f"{done} files were there already from a run that was stopped"] if done else [])


def _take_up(work: Path, plan: dict[str, Any]) -> int:
    """Make the unfinished directory, or take up one of the same plan; return how many files are there."""
    text = json.dumps(plan, sort_keys=True)
    if work.exists() and not ((work / PLAN).is_file() and (work / PLAN).read_text(encoding="utf-8") == text):
        shutil.rmtree(work)  # of another store, vocabulary or length
    work.mkdir(parents=True, exist_ok=True)
    (work / PLAN).write_text(text, encoding="utf-8")
    for place in work.iterdir():  # killed while files got their last names
        if place.name.startswith("data-"):
            place.rename(work / f"{place.name.split('-')[1]}.arrow")
    return len(list(work.glob("*.arrow")))


def _write(place: Path, store: CellStore, encoder: RankEncoder, cells: np.ndarray) -> None:
    """Write one file of cells: all of it, or nothing under its name."""
    schema, temporary = _schema(store), place.with_name(place.name + TEMPORARY)
    first, last = (int(cells[0]), int(cells[-1])) if len(cells) else (0, -1)
    obs = store.obs_slice(None, first, last + 1)
    with pa.OSFile(str(temporary), "wb") as file, pa.ipc.new_stream(file, schema) as stream:
        for at in range(0, len(cells), CELLS_AT_ONCE):
            stream.write_batch(_batch(store, encoder, cells[at : at + CELLS_AT_ONCE], schema, obs))
    flush_file(temporary)
    move_into_place(temporary, place)


def _batch(
    store: CellStore, encoder: RankEncoder, cells: np.ndarray, schema: pa.Schema, obs: pd.DataFrame
) -> pa.RecordBatch:
    tokens, cu_lengths = encoder.encode(*store.gather(cells))
    lists = pa.ListArray.from_arrays(pa.array(cu_lengths.astype(np.int32)), pa.array(tokens))
    columns, here = [lists, pa.array(np.diff(cu_lengths)), pa.array(cells)], obs.loc[cells]
    columns += [_column(here[field.name], field.type) for field in list(schema)[len(columns) :]]
    return pa.RecordBatch.from_arrays(columns, schema=schema)


def _column(column: pd.Series, kind: pa.DataType) -> pa.Array:
    if pa.types.is_string(kind):  # categories become text: `datasets` reads no dictionary-coded column
        column = column.astype(object).where(column.notna(), None).map(str, na_action="ignore")
    return pa.array(column, kind, from_pandas=True)


def _schema(store: CellStore) -> pa.Schema:
    fields = [pa.field(TOKENS, pa.list_(pa.int32())), pa.field(LENGTH, pa.int64()), pa.field(CELL, pa.int64())]
    taken, none = {field.name for field in fields}, store.obs_slice(None, 0, 0)
    for name in store.obs_columns:
        if name not in taken:
            fields.append(pa.field(name, _kind(none[name].dtype)))
    return pa.schema(fields)


def _kind(dtype: Any) -> pa.DataType:
    if pd.api.types.is_bool_dtype(dtype):
        return pa.bool_()
    if pd.api.types.is_integer_dtype(dtype):
        return pa.int64()
    return pa.float64() if pd.api.types.is_float_dtype(dtype) else pa.string()


def _describe(folder: Path, names: list[str], schema: pa.Schema, plan: str) -> None:
    """Write the two files that make Arrow files a dataset."""
    kinds = {field.name: {"dtype": _dtype(field.type), "_type": "Value"} for field in schema if field.name != TOKENS}
    features = {TOKENS: {"feature": {"dtype": "int32", "_type": "Value"}, "_type": "Sequence"}, **kinds}
    info = {"citation": "", "description": "", "features": features, "homepage": "", "license": ""}
    state: dict[str, Any] = {
        "_data_files": [{"filename": name} for name in names],
        "_fingerprint": hashlib.sha256(plan.encode()).hexdigest()[:16],
        "_format_columns": None,
        "_format_kwargs": {},
        "_format_type": None,
        "_output_all_columns": False,
        "_split": None,
    }
    for name, content in (("dataset_info.json", info), ("state.json", state)):
        (folder / name).write_text(json.dumps(content, indent=2, sort_keys=True), encoding="utf-8")
        flush_file(folder / name)


def _dtype(kind: pa.DataType) -> str:
    return {"double": "float64"}.get(str(kind), str(kind))
