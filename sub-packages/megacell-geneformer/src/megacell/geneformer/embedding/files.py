# SPDX-License-Identifier: Apache-2.0
"""Embeddings of all cells of a file or store, written beside it: in bounded memory, resumable, over several ranks.

While it works, a folder beside the output holds the embeddings and numbers of tokens, mapped; a number below zero says
that a cell is still to be done, and started again, only those cells are computed. Under torchrun or srun each rank
computes its part of the cells, and the first writes the output once all are there.
"""

import json
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from megacell.core import lock
from megacell.core.errors import DataError, UsageError
from megacell.core.files import TEMPORARY, flush_file, move_into_place, remove_tree
from megacell.core.progress import Progress
from megacell.geneformer.embedding.embedder import Embedder
from megacell.geneformer.embedding.inputs import ROWS_AT_ONCE, CellInput, open_input
from megacell.geneformer.vocabulary.vocabulary import check_coverage, refuse_existing
from megacell.store.conversion.options import State
from megacell.store.sources.anndata_file import open_h5, refuse_stored_elsewhere
from megacell.training.distributed import device, launch

KEY = "X_megacell"  # in obsm
COUNT = "megacell_n_tokens"  # in obs
PARTIAL = ".embedding"  # ends the name of the folder of unfinished work
SUFFIXES = (".h5ad", ".npy", ".parquet")
HDF5_OVERHEAD = 1 << 20  # bytes that HDF5 may add to what it is given
TO_DO = -1
POLL = 0.2  # seconds between looks at the other ranks' marks


def embed_file(
    model_path: Path,
    data: Path,
    out: Path,
    *,
    pool: str = "mean",
    layer: str | int = "second_to_last",
    counts: str = "auto",
    gene_ids: str = "auto",
    allow_subset: bool = False,
    allow_low_coverage: bool = False,
) -> list[str]:
    """Embed all cells of a file or a store, in their order, and write them.

    Parameters
    ----------
    model_path : Path
        .nemo file, Hugging Face directory, run or checkpoint.
    data : Path
        A store, or a file of any format that `convert` reads.
    out : Path
        ``.h5ad`` (a copy of an .h5ad input to which ``obsm["X_megacell"]``, ``obs["megacell_n_tokens"]`` and
        ``uns["megacell"]`` are added; of other inputs the cells' metadata with them), ``.npy`` or ``.parquet``.

    Returns
    -------
    list of str
        What a user should know; of ranks but the first, nothing.

    Raises
    ------
    UsageError, DataError
        For arguments, a model, a file or counts that do not do; nothing is written then.
    """
    from megacell.geneformer.interchange.open import open_model

    if out.suffix not in SUFFIXES:
        raise UsageError(f"--out {out}: must end in {', '.join(SUFFIXES)}")
    refuse_existing(out)
    if not data.exists():
        raise UsageError(f"{data}: no such file or folder")
    with open_input(data, counts, gene_ids, allow_subset=allow_subset) as cells:
        if _is_copied(out, data):
            _check_copy(data, data)
        device.use_local()
        model = open_model(model_path)
        covered = check_coverage(cells.gene_ids, cells.symbols, model.vocabulary, str(data), allow=allow_low_coverage)
        embedder = Embedder(model, cells.gene_ids, cells.symbols, pool, layer)
        facts = {
            "model": str(model_path),
            "step": int(model.cfg.provenance.step),
            "vocabulary": model.vocabulary.hash,
            "pool": pool,
            "layer": embedder.layer,
            "layers": model.sizes.layers,
            "coverage": covered,
        }
        request = {**facts, "states": [_state(model_path), _state(data)], "counts": counts, "gene_ids": gene_ids}
        with _only_one(out):
            work = Unfinished.open(out, json.dumps(request, sort_keys=True), len(cells), embedder.width)
            lines = [f"going on: {there:,} of {len(cells):,} cells were there"] if (there := work.there()) else []
            _compute(work, embedder, cells)
            if not launch.is_first():
                return []
            work.wait()
            _write(out, data, cells.obs, work, facts)
            lines += _lines(out, work, covered)
            work.remove()
            return lines


@contextmanager
def _only_one(out: Path) -> Iterator[None]:
    """Hold the output's lock, on the first rank for all; DataError if another process is writing it."""
    if not launch.is_first():
        yield
        return
    out.parent.mkdir(parents=True, exist_ok=True)
    with lock.held(lock.beside(out), f"{out}: another process is writing it"):
        refuse_existing(out)  # again: the other one may have ended between
        yield


def _is_copied(out: Path, data: Path) -> bool:
    """True if the output is a copy of the input with our keys added."""
    return out.suffix == ".h5ad" and data.suffix == ".h5ad"


def _check_copy(path: Path, data: Path) -> None:
    """Raise for what would have HDF5 read or write other files when our keys are added to a copy.

    Parameters
    ----------
    path : Path
        The input, or its copy.
    data : Path
        The input, for messages.
    """
    import h5py

    with open_h5(path) as file:
        refuse_stored_elsewhere(file, data, ("obs", "obsm", "uns"))
        for name in ("obsm", "uns"):
            if name in file and not isinstance(file[name], h5py.Group):
                raise DataError(f"{data}: {name} is no group, so nothing can be added to it; write the file anew")


def _state(path: Path) -> list[int]:
    state = State.of(path)
    return [state.size, state.modified]


@dataclass
class Unfinished:
    """Work on the way to a file: embeddings float32 [cells, hidden], tokens int64 [cells], `TO_DO` where not done."""

    folder: Path
    embeddings: np.ndarray
    n_tokens: np.ndarray

    @classmethod
    def open(cls, out: Path, request: str, cells: int, width: int) -> "Unfinished":
        """Go on with the work of the same request, or begin; ranks but the first wait until it has begun."""
        folder = out.with_name(f".{out.name}{PARTIAL}")
        if launch.is_first():
            if folder.is_symlink() or not _is(folder, request):
                remove_tree(folder.parent, folder.name)
                _begin(folder, request, cells, width)
        else:
            while not _is(folder, request):
                time.sleep(POLL)
        return cls(folder, *(np.load(folder / f"{name}.npy", mmap_mode="r+") for name in ("embeddings", "n_tokens")))

    def there(self) -> int:
        """Return how many cells are done."""
        return int((self.n_tokens != TO_DO).sum())

    def put(self, start: int, embeddings: np.ndarray, n_tokens: np.ndarray) -> None:
        """Keep the results of some cells: on the disk before the numbers that say so."""
        self.embeddings[start : start + len(embeddings)] = embeddings
        self.embeddings.flush()  # type: ignore[attr-defined]
        self.n_tokens[start : start + len(n_tokens)] = n_tokens

    def wait(self) -> None:
        """Wait until all ranks have put their cells; their launcher ends this one where one of them dies."""
        while self.there() < len(self.n_tokens):
            time.sleep(POLL)

    def remove(self) -> None:
        """Take the folder away."""
        remove_tree(self.folder.parent, self.folder.name)


def _is(folder: Path, request: str) -> bool:
    try:
        return (folder / "request.json").read_text() == request
    except OSError:
        return False


def _begin(folder: Path, request: str, cells: int, width: int) -> None:
    """Make the folder of unfinished work, with room for all of it on the disk."""
    temporary = folder.with_name(folder.name + TEMPORARY)
    remove_tree(temporary.parent, temporary.name)
    temporary.mkdir()
    try:
        path = temporary / "embeddings.npy"
        np.lib.format.open_memmap(path, mode="w+", dtype="<f4", shape=(cells, width))
        with open(path, "rb+") as file:  # mapped pages that find no room would end the process
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
        np.save(temporary / "n_tokens.npy", np.full(cells, TO_DO, np.int64))
        (temporary / "request.json").write_text(request)
        move_into_place(temporary, folder)
    except OSError as error:
        with suppress(OSError):
            remove_tree(temporary.parent, temporary.name)
        raise DataError(f"{folder}: {error.strerror or error}; see to room and rights") from error


def _compute(work: Unfinished, embedder: Embedder, cells: CellInput) -> None:
    """Compute this rank's cells from the first one that is not done."""
    ranks = launch.world_size(1)
    start, stop = (len(cells) * (launch.rank() + i) // ranks for i in range(2))
    to_do = np.flatnonzero(work.n_tokens[start:stop] == TO_DO)
    start = start + int(to_do[0]) if len(to_do) else stop
    with Progress(show=launch.is_first()) as bar:
        bar.start("embedding cells", stop - start)
        for rows in cells.rows(start, stop) if start < stop else ():
            work.put(start, *embedder.embed(rows))
            start += rows.shape[0]
            bar.advance(rows.shape[0])


def _lines(out: Path, work: Unfinished, covered: float) -> list[str]:
    cells, width = work.embeddings.shape
    lines = [f"{out}: {cells:,} cells x {width}; the file measures {covered:.0%} of the vocabulary"]
    if empty := int((work.n_tokens == 0).sum()):
        lines.append(empty_cells(empty))
    return lines


def empty_cells(number: int) -> str:
    """Return the warning for cells that have no embedding."""
    return (
        f"warning: {number:,} cells have no gene of the vocabulary and are NaN; "
        f"leave them out with adata[adata.obs['{COUNT}'] > 0]"
    )


def _write(out: Path, data: Path, obs: pd.DataFrame, work: Unfinished, facts: dict) -> None:
    """Write in the folder of unfinished work, from which a killed one is swept, then rename."""
    temporary = work.folder / out.name
    try:
        remove_tree(work.folder, out.name)
        _make_room(temporary, work.embeddings.nbytes + work.n_tokens.nbytes)
        if out.suffix == ".npy":
            with open(temporary, "wb") as file:
                np.save(file, work.embeddings)
        elif out.suffix == ".parquet":
            _write_parquet(temporary, obs, work)
        else:
            _write_h5ad(temporary, data, obs, work, facts)
        flush_file(temporary)
        move_into_place(temporary, out)
    except OSError as error:
        raise DataError(f"{out}: could not be written: {error.strerror or error}; see to room and rights") from error
    finally:
        temporary.unlink(missing_ok=True)


def _make_room(path: Path, size: int) -> None:
    """Raise OSError unless ``size`` bytes fit behind a file: HDF5 crashes where a disk fills up under it."""
    with open(path, "ab") as file:
        end = file.tell()
        try:
            os.posix_fallocate(file.fileno(), end, size)
        finally:
            file.truncate(end)


def _write_parquet(path: Path, obs: pd.DataFrame, work: Unfinished) -> None:
    """Write the embeddings a column a number, and the tokens, under the cells' names, block by block."""
    names = [f"{KEY}_{i}" for i in range(work.embeddings.shape[1])]
    writer = None
    for start in range(0, len(obs), 16 * ROWS_AT_ONCE):
        part = slice(start, start + 16 * ROWS_AT_ONCE)
        frame = pd.DataFrame(work.embeddings[part], index=obs.index[part], columns=names)
        table = pa.Table.from_pandas(frame.assign(**{COUNT: work.n_tokens[part]}), preserve_index=True)
        writer = writer or pq.ParquetWriter(path, table.schema)
        writer.write_table(table)
    if writer is not None:
        writer.close()


def _write_h5ad(path: Path, data: Path, obs: pd.DataFrame, work: Unfinished, facts: dict[str, Any]) -> None:
    """Copy an .h5ad and add our keys, touching nothing else; of other inputs, write the metadata and the keys."""
    import anndata as ad
    import h5py

    embeddings, n_tokens = np.asarray(work.embeddings), np.asarray(work.n_tokens)  # no copies: views of the maps
    added = 2 * embeddings.nbytes + n_tokens.nbytes + int(obs.memory_usage(deep=True).sum()) + HDF5_OVERHEAD
    if not _is_copied(path, data):
        _make_room(path, added)
        adata = ad.AnnData(obs=obs.assign(**{COUNT: n_tokens}), obsm={KEY: embeddings}, uns={"megacell": facts})
        adata.write_h5ad(path)
        return
    shutil.copyfile(data, path)
    _check_copy(path, data)  # again: the input may have changed since
    _make_room(path, added)
    with h5py.File(path, "r+") as file:
        for group in ("obsm", "uns"):
            if group not in file:
                ad.io.write_elem(file, group, {})
        ad.io.write_elem(file, f"obsm/{KEY}", embeddings)
        ad.io.write_elem(file, "uns/megacell", facts)
        kept = ad.io.read_elem(file["obs"])
        ad.io.write_elem(file, "obs", kept.assign(**{COUNT: n_tokens}))
