# SPDX-License-Identifier: Apache-2.0
"""Embeddings of cells and of their genes: counts → tokens → packs → hidden states, in the order of the rows."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import scipy.sparse as sp
import torch

from megacell.core.errors import UsageError
from megacell.geneformer.model.bert import Pack
from megacell.geneformer.model.states import attention_maps, hidden_states
from megacell.geneformer.tokens.masking import MaskSettings
from megacell.geneformer.tokens.packing import Packer
from megacell.geneformer.tokens.rank_encoder import RankEncoder
from megacell.store.sampling.sharing import ranges_within
from megacell.training.distributed import device

if TYPE_CHECKING:  # it brings NeMo with it
    from megacell.geneformer.model.geneformer_model import GeneformerModel

POOLS = ("mean", "cls")
PACK_TOKENS = {"cpu": 4_096, "cuda": 16_384}  # of one forward pass: what stays in a cache, and what fills a GPU


@dataclass
class PackedCells:
    """Some of the rows as one pack.

    Attributes
    ----------
    cells : int64 [C]
        Which rows: those with a gene that the vocabulary knows.
    tokens : int64 [T]
    starts : int32 [C + 1]
        Where each cell begins in the pack.
    pack : Pack
        On the model's device.
    """

    cells: np.ndarray
    tokens: np.ndarray
    starts: np.ndarray
    pack: Pack


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
        self,
        model: "GeneformerModel",
        gene_ids: Any,
        symbols: Any,
        pool: str = "mean",
        layer: str | int = "second_to_last",
    ):
        self.model, self.vocabulary = model, model.vocabulary
        if pool not in POOLS or (pool == "cls" and "cls" not in self.vocabulary.specials):
            raise UsageError(f"--pool {pool}: choose mean" + (" or cls" if "cls" in self.vocabulary.specials else ""))
        self.pool, self.layer = pool, layer_number(layer, model.sizes.layers)
        self.width = model.sizes.hidden
        self._packer = Packer(RankEncoder(gene_ids, symbols, self.vocabulary, model.sizes.max_length), MaskSettings())

    def packs(self, rows: sp.csr_matrix) -> Iterator[PackedCells]:
        """Yield the rows as packs of at most `PACK_TOKENS` tokens of the model's device (or one cell)."""
        rows = sp.csr_matrix(rows)
        where = next(self.model.bert.parameters()).device
        most = np.minimum(np.diff(rows.indptr) + 2, self.model.sizes.max_length)
        for first, last in ranges_within(most, PACK_TOKENS[where.type]):
            bounds = rows.indptr[first : last + 1]
            part = slice(bounds[0], bounds[-1])
            gathered = (bounds - bounds[0]).astype(np.int64), rows.indices[part], rows.data[part]
            batch = self._packer.pack(gathered, np.arange(first, last))
            lengths = np.diff(batch.cu_seqlens)
            cells = np.arange(first, last)[lengths > 0]
            if len(cells):
                starts = np.concatenate([[0], np.cumsum(lengths[lengths > 0])]).astype(np.int32)
                pack = Pack.of(batch, where)
                pack.cu_seqlens = torch.from_numpy(starts).to(where)  # cells without a gene have no place in it
                yield PackedCells(cells, batch.tokens, starts, pack)

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
        embeddings = np.full((rows.shape[0], self.width), np.nan, np.float32)
        n_tokens = np.zeros(rows.shape[0], np.int64)
        before, after = len(self.vocabulary.prefix), len(self.vocabulary.suffix)
        for packed in self.packs(rows):
            states = self.states(packed)
            if self.pool == "cls":
                pooled = states[packed.pack.cu_seqlens[:-1].long()]
            else:
                pooled = torch.stack([states[a + before : b - after].mean(0) for a, b in pairwise(packed.starts)])
            embeddings[packed.cells] = pooled.cpu().numpy()
            n_tokens[packed.cells] = np.diff(packed.starts)
        return embeddings, n_tokens

    @torch.inference_mode()
    def states(self, packed: PackedCells) -> torch.Tensor:
        """Return the layer's hidden states [T, hidden] of a pack, float32, on the model's device."""
        with device.single_process():
            return hidden_states(self.model.bert, packed.pack, self.layer).float()

    @torch.inference_mode()
    def attention(self, packed: PackedCells) -> list[torch.Tensor]:
        """Return what each token of each cell attends to in the layer: [heads, tokens, tokens] a cell, float32."""
        with device.single_process():
            return attention_maps(self.model.bert, packed.pack, self.layer)


def layer_number(layer: str | int, layers: int) -> int:
    """Return the number, from 1, that a layer's name stands for.

    Raises
    ------
    UsageError
        The model has no such layer.
    """
    named = {"last": layers, "second_to_last": layers - 1}
    number = named.get(str(layer)) or (int(layer) if str(layer).isdigit() else 0)
    if not 1 <= number <= layers:
        names = "last, second_to_last" if layers > 1 else "last"
        raise UsageError(f"--layer {layer}: choose {names} or a number from 1 to {layers}, the model's layers")
    return number
