# SPDX-License-Identifier: Apache-2.0
"""Micro-batches of tokens for the store's batch stream."""

import numpy as np

from megacell.core.errors import UsageError
from megacell.geneformer.tokens.encoder import CellEncoder
from megacell.geneformer.tokens.masking import MaskSettings
from megacell.geneformer.tokens.packing import MicroBatch, Packer
from megacell.geneformer.tokens.token_dataset import encoder_for
from megacell.geneformer.vocabulary.vocabulary import Vocabulary
from megacell.store.read.reader import CellReader
from megacell.store.sampling.batch_stream import BatchStream
from megacell.store.sampling.cell_set import CellSet
from megacell.store.sampling.order import Order


class TokenCollator:
    """Makes micro-batches of tokens, masked; see `megacell.store.sampling.batch_stream.Collator`.

    Parameters
    ----------
    encoder : CellEncoder
    masking : MaskSettings
    multiple_of : int
        A micro-batch's length is rounded up to a multiple of this.
    """

    def __init__(self, encoder: CellEncoder, masking: MaskSettings, multiple_of: int) -> None:
        self._packer = Packer(encoder, masking, multiple_of)
        self.max_cost, self.multiple_of = encoder.max_length, multiple_of
        self.needed = f"a gene that vocabulary {encoder.vocabulary.name} knows"

    def costs(self, lengths: np.ndarray) -> np.ndarray:
        """Return how many tokens cells with so many known genes become."""
        return self._packer.encoder.input_lengths(lengths)

    def make(
        self, reader: CellReader, cells: np.ndarray, keys: np.ndarray, first: np.ndarray, costs: np.ndarray
    ) -> list[MicroBatch]:
        """Make micro-batches; see `Packer.packs`."""
        return self._packer.packs(reader, cells, keys, first, costs)


def token_stream(
    store: CellReader,
    vocabulary: Vocabulary,
    cells: np.ndarray | CellSet,
    lengths: np.ndarray,
    *,
    max_length: int,
    global_batch: int,
    token_budget: int,
    multiple_of: int = 64,
    seed: int,
    rank: int = 0,
    ranks: int = 1,
    masking: MaskSettings | None = None,
    order: Order | None = None,
    validation: bool = False,
) -> BatchStream[MicroBatch]:
    """Return the endless sequence of global batches of tokens, as one rank sees it.

    Parameters
    ----------
    store : CellStore or TokenFolder
    vocabulary : Vocabulary
    cells : int64 [n] or CellSet
        The cells to go through, by global number; those without a known gene are skipped.
    lengths : uint16 [cells of the store]
        From `token_lengths`.
    max_length : int
        Longest cell in tokens, specials included.
    global_batch : int
        Cells of one step, over all ranks.
    token_budget : int
        Most real tokens of one micro-batch.
    multiple_of : int, default 64
        A micro-batch's length is rounded up to a multiple of this.
    seed : int
    rank, ranks : int
        Data-parallel ranks.
    masking : MaskSettings, optional
    order, validation
        See `BatchStream`.

    Raises
    ------
    UsageError
        A budget below max_length, or as `BatchStream`.
    DataError
        As `BatchStream`.
    """
    if token_budget < max_length:
        raise UsageError(f"token_budget {token_budget} does not hold a cell of max_length {max_length}; raise it")
    encoder = encoder_for(store, vocabulary, max_length)
    return BatchStream(
        store,
        cells,
        lengths,
        TokenCollator(encoder, masking or MaskSettings(), multiple_of),
        global_batch=global_batch,
        cost_budget=token_budget,
        seed=seed,
        rank=rank,
        ranks=ranks,
        order=order,
        validation=validation,
    )
