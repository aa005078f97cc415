# SPDX-License-Identifier: Apache-2.0
"""Embeddings of cells: counts → tokens → packs → hidden states → one vector a cell, in the input's order."""

import os
from collections.abc import Iterator
from contextlib import ExitStack
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import scipy.sparse as sp
import torch

from megacell.geneformer.batches import MicroBatch, Packer
from megacell.geneformer.masking import MaskSettings
from megacell.geneformer.model.bert import Pack
from megacell.geneformer.model.layers import PostNormLayer
from megacell.geneformer.ranking import RankEncoder
from megacell.geneformer.training import device
from megacell.geneformer.vocabulary import check_coverage, refuse_existing
from megacell.store import CellStore
from megacell.store.durable import TEMPORARY, flush_file, move_into_place
from megacell.store.errors import DataError, UsageError
from megacell.store.progress import Progress
from megacell.store.sources.h5ad import open_h5ad

KEY = "X_megacell"  # in obsm
COUNT = "megacell_n_tokens"  # in obs
POOLS = ("mean", "cls")
PACK_TOKENS = 16_384  # of one forward pass
ROWS_AT_ONCE = 2048
LEAST_GENES = 10_000  # a file that measures fewer is a selection of genes
HDF5_OVERHEAD = 1 << 20  # bytes that HDF5 may add to what it is given
SUFFIXES = (".h5ad", ".npy", ".parquet")


class Embedder:
    """Embeds cells with one model.

    Parameters
    ----------
    model : GeneformerModel
        From ``open_model``.
    gene_ids, symbols : sequence of str [genes]
        What the columns of counts are.
    pool : {"mean", "cls"}
        The mean over a cell's genes (specials left out), or the state at ``<cls>``.
    layer : str or int
        "last" (after the final norm), "second_to_last" (as Geneformer does), or the number of a layer from 1.

    Raises
    ------
    UsageError
        For a pool or layer that the model has not.
    """

    def __init__(
        self, model: Any, gene_ids: Any, symbols: Any, pool: str = "mean", layer: str | int = "second_to_last"
    ):
        self.model, self.vocabulary = model, model.vocabulary
        if pool not in POOLS or (pool == "cls" and "cls" not in self.vocabulary.specials):
            raise UsageError(f"--pool {pool}: choose mean" + (" or cls" if "cls" in self.vocabulary.specials else ""))
        self.pool, self.layer = pool, _layer_number(layer, model.sizes.layers)
        self.width = model.sizes.hidden
        self._packer = Packer(RankEncoder(gene_ids, symbols, self.vocabulary, model.sizes.max_length), MaskSettings())

    def embed(self, rows: sp.csr_matrix) -> tuple[np.ndarray, np.ndarray]:
        """Embed cells.

        Parameters
        ----------
        rows : csr_matrix [cells, genes]
            Counts.

        Returns
        -------
        embeddings : float32 [cells, hidden]
            NaN for a cell without a known gene.
        n_tokens : int64 [cells]
            Tokens that the model saw, specials included.
        """
        rows = sp.csr_matrix(rows)
        embeddings = np.full((rows.shape[0], self.width), np.nan, np.float32)
        n_tokens = np.zeros(rows.shape[0], np.int64)
        for first, last in _packs(np.minimum(np.diff(rows.indptr) + 2, self.model.sizes.max_length)):
            bounds = rows.indptr[first : last + 1]
            part = slice(bounds[0], bounds[-1])
            gathered = (bounds - bounds[0]).astype(np.int64), rows.indices[part], rows.data[part]
            batch = self._packer.pack(gathered, np.arange(first, last))
            lengths = np.diff(batch.cu_seqlens)
            n_tokens[first:last] = lengths
            seen = lengths > 0
            if seen.any():
                embeddings[first:last][seen] = self._forward(batch, lengths[seen])
        return embeddings, n_tokens

    @torch.inference_mode()
    def _forward(self, batch: MicroBatch, lengths: np.ndarray) -> np.ndarray:
        starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
        pack = Pack.of(batch, next(self.model.bert.parameters()).device)
        pack.cu_seqlens = torch.from_numpy(starts).to(pack.cu_seqlens)  # cells without a gene have no place in it
        with device.single_process():
            states = hidden_states(self.model.bert, pack, self.layer).float()
        if self.pool == "cls":
            return states[pack.cu_seqlens[:-1].long()].cpu().numpy()
        before, after = len(self.vocabulary.prefix), len(self.vocabulary.suffix)
        means = [states[a + before : b - after].mean(0) for a, b in pairwise(starts)]
        return torch.stack(means).cpu().numpy()


def hidden_states(bert: Any, pack: Pack, layer: int) -> torch.Tensor:
    """Return the hidden states [T, h] after layer ``layer`` (0: the embeddings); after the last, behind its norm.

    In a post-LN network, as in BERT's papers and Hugging Face's ``hidden_states``, a layer ends with its norm, which
    stands at the start of the next one here.
    """
    layers = bert.encoder.layers
    if layer == len(layers):
        return bert.encode(pack)
    where = layers[layer].input_layernorm if isinstance(layers[layer], PostNormLayer) else layers[layer]
    kept: list[torch.Tensor] = []
    if where is layers[layer]:
        hook = where.register_forward_pre_hook(
            lambda module, args, given: kept.append(given["hidden_states"]), with_kwargs=True
        )
    else:
        hook = where.register_forward_hook(lambda module, inputs, output: kept.append(output))
    try:
        bert.encode(pack)
    finally:
        hook.remove()
    states = kept[0] if isinstance(kept[0], torch.Tensor) else kept[0][0]
    return states.squeeze(1)


def _layer_number(layer: str | int, layers: int) -> int:
    named = {"last": layers, "second_to_last": layers - 1}
    number = named.get(str(layer)) or (int(layer) if str(layer).isdigit() else 0)
    if not 1 <= number <= layers:
        names = "last, second_to_last" if layers > 1 else "last"
        raise UsageError(f"--layer {layer}: choose {names} or a number from 1 to {layers}, the model's layers")
    return number


def _packs(lengths: np.ndarray) -> Iterator[tuple[int, int]]:
    """Yield ranges of cells, in order, of at most PACK_TOKENS tokens (or one cell)."""
    ends = np.cumsum(lengths)
    first = 0
    while first < len(lengths):
        before = ends[first - 1] if first else 0
        last = max(first + 1, int(np.searchsorted(ends, before + PACK_TOKENS, side="right")))
        yield first, last
        first = last


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
    """Embed all cells of an .h5ad file or a store, in their order, and write them.

    Parameters
    ----------
    model_path : Path
        .nemo file, run or checkpoint.
    data : Path
        .h5ad file or store.
    out : Path
        ``.h5ad`` (a copy of the input to which ``obsm["X_megacell"]``, ``obs["megacell_n_tokens"]`` and
        ``uns["megacell"]`` are added), ``.npy`` or ``.parquet``.

    Returns
    -------
    list of str
        What a user should know.

    Raises
    ------
    UsageError, DataError
        For arguments, a model, a file or counts that do not do; nothing is written then.
    """
    from megacell.geneformer.interchange.open import open_model

    if out.suffix not in SUFFIXES:
        raise UsageError(f"--out {out}: must end in {', '.join(SUFFIXES)}")
    refuse_existing(out)
    with ExitStack() as stack:
        if data.is_dir():
            store = CellStore.open(data)
            ids, symbols, cells, obs = store.gene_ids, store.symbols, len(store), store.obs
            blocks: Iterator[sp.csr_matrix] = (
                store.rows(np.arange(a, min(a + ROWS_AT_ONCE, cells))) for a in range(0, cells, ROWS_AT_ONCE)
            )
        else:
            source = stack.enter_context(open_h5ad(data, counts, gene_ids))
            ids, symbols, cells, obs = source.gene_ids, source.symbols, source.n_cells, source.obs()
            blocks = source.blocks(ROWS_AT_ONCE)
            if len(ids) < LEAST_GENES and not allow_subset:
                raise DataError(
                    f"{data}: measures {len(ids):,} genes, a selection: ranks and totals differ from those of whole "
                    "cells; give the file with all genes, or --allow-subset"
                )
        model = open_model(model_path)
        covered = check_coverage(ids, symbols, model.vocabulary, str(data), allow=allow_low_coverage)
        embedder = Embedder(model, ids, symbols, pool, layer)
        parts = []
        with Progress(show=True) as bar:
            bar.start("embedding cells", cells)
            for block in blocks:
                parts.append(embedder.embed(block))
                bar.advance(block.shape[0])
    embeddings = np.concatenate([p[0] for p in parts])
    n_tokens = np.concatenate([p[1] for p in parts])
    facts = {
        "model": str(model_path),
        "step": int(model.cfg.provenance.step),
        "vocabulary": model.vocabulary.hash,
        "pool": pool,
        "layer": embedder.layer,
        "layers": model.sizes.layers,
        "coverage": covered,
    }
    _write(out, data, obs, embeddings, n_tokens, facts)
    return _lines(out, embeddings, n_tokens, covered)


def _lines(out: Path, embeddings: np.ndarray, n_tokens: np.ndarray, covered: float) -> list[str]:
    lines = [
        f"{out}: {len(embeddings):,} cells x {embeddings.shape[1]}; the file measures {covered:.0%} of the vocabulary"
    ]
    if empty := int((n_tokens == 0).sum()):
        lines.append(
            f"warning: {empty:,} cells have no gene of the vocabulary and are NaN; "
            f"leave them out with adata[adata.obs['{COUNT}'] > 0]"
        )
    return lines


def _write(out: Path, data: Path, obs: pd.DataFrame, embeddings: np.ndarray, n_tokens: np.ndarray, facts: dict) -> None:
    """Write beside ``out``, then rename."""
    temporary = out.with_name(out.name + TEMPORARY)
    try:
        _make_room(temporary, embeddings.nbytes + n_tokens.nbytes)
        if out.suffix == ".npy":
            with open(temporary, "wb") as file:
                np.save(file, embeddings)
        elif out.suffix == ".parquet":
            table = pd.DataFrame(
                embeddings, index=obs.index, columns=[f"{KEY}_{i}" for i in range(embeddings.shape[1])]
            )
            table.assign(**{COUNT: n_tokens}).to_parquet(temporary)
        else:
            _write_h5ad(temporary, data, obs, embeddings, n_tokens, facts)
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


def _write_h5ad(
    path: Path, data: Path, obs: pd.DataFrame, embeddings: np.ndarray, n_tokens: np.ndarray, facts: dict
) -> None:
    """Copy an .h5ad and add our keys, touching nothing else; of a store, write the cells' metadata and the keys."""
    import shutil

    import anndata as ad
    import h5py

    added = 2 * embeddings.nbytes + n_tokens.nbytes + int(obs.memory_usage(deep=True).sum()) + HDF5_OVERHEAD
    if data.is_dir():
        _make_room(path, added)
        adata = ad.AnnData(obs=obs.assign(**{COUNT: n_tokens}), obsm={KEY: embeddings}, uns={"megacell": facts})
        adata.write_h5ad(path)
        return
    shutil.copyfile(data, path)
    _make_room(path, added)
    with h5py.File(path, "r+") as file:
        for group in ("obsm", "uns"):
            if group not in file:
                ad.io.write_elem(file, group, {})
        ad.io.write_elem(file, f"obsm/{KEY}", embeddings)
        ad.io.write_elem(file, "uns/megacell", facts)
        kept = ad.io.read_elem(file["obs"])
        ad.io.write_elem(file, "obs", kept.assign(**{COUNT: n_tokens}))
