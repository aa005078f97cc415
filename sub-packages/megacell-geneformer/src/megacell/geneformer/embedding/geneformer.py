# SPDX-License-Identifier: Apache-2.0
"""`Geneformer`: a trained model in a notebook's hands: load, process, embed, look at attention."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import scipy.sparse as sp

from megacell.core.errors import UsageError
from megacell.core.progress import Progress
from megacell.geneformer.embedding.embedder import Embedder, PackedCells
from megacell.geneformer.embedding.files import COUNT, KEY, empty_cells
from megacell.geneformer.embedding.inputs import CellInput, open_input
from megacell.geneformer.vocabulary.vocabulary import Vocabulary, check_coverage
from megacell.store import CellStore

if TYPE_CHECKING:
    from anndata import AnnData

    from megacell.geneformer.model.geneformer_model import GeneformerModel

LEVELS = ("cell", "gene")


@dataclass(repr=False)
class TokenizedCells:
    """Cells as a model sees them, in the input's order.

    Attributes
    ----------
    cells : object str [cells]
        Names.
    tokens : int64 [T]
        Cell after cell, specials included; none of a cell without a known gene.
    offsets : int64 [cells + 1]
        Cell i is ``tokens[offsets[i]:offsets[i + 1]]``.
    gene_ids : object str [T]
        The gene that each token is; "" for specials.
    """

    cells: np.ndarray
    tokens: np.ndarray
    offsets: np.ndarray
    gene_ids: np.ndarray

    def __len__(self) -> int:
        return len(self.cells)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({len(self):,} cells, {len(self.tokens):,} tokens)"


@dataclass(repr=False)
class GeneEmbeddings(TokenizedCells):
    """Tokens with their hidden states: ``values`` float32 [T, hidden]."""

    values: np.ndarray


class Geneformer:
    """A trained model.

    Examples
    --------
    >>> model = Geneformer.load("model.nemo")  # doctest: +SKIP
    >>> model.embed(adata)  # doctest: +SKIP
    >>> adata.obsm["X_megacell"]  # doctest: +SKIP
    """

    def __init__(self, model: "GeneformerModel") -> None:
        self.model = model

    def __repr__(self) -> str:
        sizes, words = self.model.sizes, self.vocabulary
        return (
            f"Geneformer({sizes.layers} layers x {sizes.hidden}, {sizes.norm}-LN, {words.name}: "
            f"{len(words.gene_ids):,} genes, cells of up to {sizes.max_length:,} tokens)"
        )

    @classmethod
    def load(
        cls, path: str | Path, vocabulary: str | Path | Vocabulary | None = None, device: str | None = None
    ) -> "Geneformer":
        """Load a model.

        Parameters
        ----------
        path : path
            .nemo file, Hugging Face directory, run or checkpoint.
        vocabulary : path or Vocabulary, optional
            For a Hugging Face directory that has none; Geneformer's own are known by their size.
        device : str, optional
            Such as "cuda:1" or "cpu"; the GPU if there is one.

        Raises
        ------
        UsageError, DataError
            No such model, a damaged one, or another vocabulary than its own.
        """
        from megacell.geneformer.interchange.open import open_model

        if isinstance(vocabulary, str | Path):
            vocabulary = Vocabulary.open(vocabulary)
        model = open_model(Path(path), vocabulary)
        return cls(model.to(device) if device is not None else model)

    @property
    def vocabulary(self) -> Vocabulary:
        """Its genes and tokens."""
        return self.model.vocabulary

    def process(
        self, data: "AnnData | str | Path | CellStore", *, counts: str = "auto", gene_ids: str = "auto",
        allow_subset: bool = False, allow_low_coverage: bool = False,
    ) -> TokenizedCells:  # fmt: skip
        """Rank and tokenize cells; parameters as for `embed`."""
        with self._open(data, "mean", "last", counts, gene_ids, allow_subset, allow_low_coverage) as (cells, embedder):
            tokens, lengths = [np.zeros(0, np.int64)], np.zeros(len(cells), np.int64)
            for numbers, packed in _packs(embedder, cells):
                tokens.append(packed.tokens[: packed.starts[-1]])
                lengths[numbers] = np.diff(packed.starts)
            return self._tokenized(cells, np.concatenate(tokens), lengths)

    def embed(
        self, data: "AnnData | str | Path | CellStore", *, level: str = "cell", layer: str | int = "second_to_last",
        pool: str = "mean", counts: str = "auto", gene_ids: str = "auto", allow_subset: bool = False,
        allow_low_coverage: bool = False,
    ) -> "np.ndarray | GeneEmbeddings":  # fmt: skip
        """Embed cells, or their genes.

        Parameters
        ----------
        data : AnnData, path or CellStore
            Raw counts; found and proven as `megacell convert` does. For files larger than memory see `embed_file`.
        level : {"cell", "gene"}
        layer : str or int
            "second_to_last" (as Geneformer), "last" (behind the final norm) or a number from 1.
        pool : {"mean", "cls"}
            Of cells: the mean of their genes' states (specials left out), or the state at ``<cls>``.
        counts, gene_ids : str
            As for `convert`.
        allow_subset, allow_low_coverage : bool
            Take data with under 10,000 genes, or with under a quarter of the vocabulary's.

        Returns
        -------
        float32 [cells, hidden], or GeneEmbeddings
            In the input's order. Cells without a known gene are NaN, with a warning. Those of an AnnData are also put
            in its ``obsm["X_megacell"]``, and the numbers of tokens in ``obs["megacell_n_tokens"]``.

        Raises
        ------
        UsageError, DataError
            For arguments or data that do not do.
        """
        if level not in LEVELS:
            raise UsageError(f"level={level}: choose one of {', '.join(LEVELS)}")
        with self._open(data, pool, layer, counts, gene_ids, allow_subset, allow_low_coverage) as (cells, embedder):
            if level == "gene":
                return self._gene_embeddings(embedder, cells)
            parts, n_tokens = zip(*(embedder.embed(rows) for rows in _rows(cells)), strict=True)
        embeddings, seen = np.concatenate(parts), np.concatenate(n_tokens)
        if empty := int((seen == 0).sum()):
            warnings.warn(empty_cells(empty).removeprefix("warning: "), stacklevel=2)
        if not isinstance(data, str | Path | CellStore):
            data.obsm[KEY], data.obs[COUNT] = embeddings, seen
        return embeddings

    def attention(
        self, data: "AnnData | str | Path | CellStore", *, layer: str | int = "last", counts: str = "auto",
        gene_ids: str = "auto", allow_subset: bool = False, allow_low_coverage: bool = False,
    ) -> "Iterator[tuple[str, np.ndarray, np.ndarray]]":  # fmt: skip
        """Yield, cell by cell in the input's order, what its tokens attend to; parameters as for `embed`.

        Yields
        ------
        cell : str
            Its name.
        gene_ids : object str [tokens]
            "" for specials.
        weights : float32 [heads, tokens, tokens]
            Row: the token that looks; each row sums to 1. Nothing is yielded for a cell without a known gene.
        """
        with self._open(data, "mean", layer, counts, gene_ids, allow_subset, allow_low_coverage) as (cells, embedder):
            names = cells.obs.index.to_numpy(object)
            for numbers, packed in _packs(embedder, cells):
                maps = embedder.attention(packed)
                for number, (a, b), weights in zip(numbers, pairwise(packed.starts), maps, strict=True):
                    yield names[number], self._genes_of(packed.tokens[a:b]), weights.cpu().numpy()

    @contextmanager
    def _open(
        self, data: Any, pool: str, layer: str | int, counts: str, gene_ids: str, allow_subset: bool, allow_low: bool
    ) -> Iterator[tuple[CellInput, Embedder]]:
        data = Path(data) if isinstance(data, str) else data
        with open_input(data, counts, gene_ids, allow_subset=allow_subset) as cells:
            check_coverage(cells.gene_ids, cells.symbols, self.vocabulary, cells.place, allow=allow_low)
            yield cells, Embedder(self.model, cells.gene_ids, cells.symbols, pool, layer)

    def _gene_embeddings(self, embedder: Embedder, cells: CellInput) -> GeneEmbeddings:
        tokens, values, lengths = [np.zeros(0, np.int64)], [], np.zeros(len(cells), np.int64)
        for numbers, packed in _packs(embedder, cells):
            tokens.append(packed.tokens[: packed.starts[-1]])
            values.append(embedder.states(packed).cpu().numpy())
            lengths[numbers] = np.diff(packed.starts)
        own = self._tokenized(cells, np.concatenate(tokens), lengths)
        empty = np.zeros((0, embedder.width), np.float32)
        return GeneEmbeddings(own.cells, own.tokens, own.offsets, own.gene_ids, np.concatenate([empty, *values]))

    def _tokenized(self, cells: CellInput, tokens: np.ndarray, lengths: np.ndarray) -> TokenizedCells:
        offsets = np.concatenate([[0], np.cumsum(lengths)])
        return TokenizedCells(cells.obs.index.to_numpy(object), tokens, offsets, self._genes_of(tokens))

    def _genes_of(self, tokens: np.ndarray) -> np.ndarray:
        names = np.full(self.vocabulary.size, "", object)
        names[self.vocabulary.tokens] = self.vocabulary.gene_ids
        return names[tokens]


def _rows(cells: CellInput) -> Iterator[sp.csr_matrix]:
    """Yield all rows, under a progress bar."""
    with Progress(show=True) as bar:
        bar.start("embedding cells", len(cells))
        for rows in cells.rows(0, len(cells)):
            yield rows
            bar.advance(rows.shape[0])


def _packs(embedder: Embedder, cells: CellInput) -> Iterator[tuple[np.ndarray, PackedCells]]:
    """Yield packs, with the numbers of their cells in the input."""
    first = 0
    for rows in _rows(cells):
        for packed in embedder.packs(rows):
            yield first + packed.cells, packed
        first += rows.shape[0]
