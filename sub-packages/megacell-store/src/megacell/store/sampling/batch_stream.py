# SPDX-License-Identifier: Apache-2.0
"""The stream of global batches: which cells each step has, which of them are this rank's, and their micro-batches.

``BatchStream.step(k)`` is a pure function of k: which cells, which of them are this rank's, their tokens and masks
follow from the seed alone, so a run may be resumed at any step, and with another number of ranks.
"""

import numpy as np

from megacell.core.errors import DataError, MegacellError, UsageError
from megacell.core.rng import TRAINING, VALIDATION, stream_key
from megacell.geneformer.tokens.masking import MaskSettings
from megacell.geneformer.tokens.packing import MicroBatch, Packer
from megacell.geneformer.tokens.token_dataset import encoder_for
from megacell.geneformer.vocabulary.vocabulary import Vocabulary
from megacell.store import CellStore
from megacell.store.sampling.cell_set import CellSet
from megacell.store.sampling.order import Order, Shuffled, global_batch
from megacell.store.sampling.prefetched import Prefetched
from megacell.store.sampling.sharing import micro_batches, ranges_within, share_out

TOKENS_AT_ONCE = 1 << 19  # of the micro-batches made in one go: 8 MiB


def _pack_tokens(lengths: np.ndarray, budget: int) -> list[int]:
    return [int(lengths[part].sum()) for part in micro_batches(lengths, budget)]


class BatchStream:
    """The endless sequence of global batches, as one rank sees it.

    Parameters
    ----------
    store : CellStore or TokenFolder
    vocabulary : Vocabulary
    cells : int64 [n] or CellSet
        The cells to go through, by global number; those without a known gene are passed over. A set holds a bit a
        cell, which is mapped; an array, eight bytes.
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
    masking : MaskSettings
    order : Order, optional
        `Shuffled` by default, or `BlockShuffled` or `Weighted`, which counts the cells that are left.
    validation : bool, default False
        Cells in their own order, masks from the validation stream's epoch 0, the last batch short: the same at every
        validation. Without it cells are shuffled anew in each epoch, and batches run on over the end of one.

    Attributes
    ----------
    skipped : int
        Cells passed over because the vocabulary knows none of their genes.

    Raises
    ------
    UsageError
        A global batch smaller than the ranks; a budget below max_length; a rank outside the ranks.
    DataError
        No cell to go through.
    """

    def __init__(
        self,
        store: CellStore,
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
    ) -> None:
        if global_batch < ranks:
            raise UsageError(
                f"global_batch {global_batch} is smaller than the number of data-parallel ranks {ranks}; raise it"
            )
        if token_budget < max_length:
            raise UsageError(f"token_budget {token_budget} does not hold a cell of max_length {max_length}; raise it")
        if not 0 <= rank < ranks:
            raise UsageError(f"rank {rank} is not one of {ranks} ranks")
        if len(lengths) != len(store):
            raise DataError(f"{store.path}: {len(lengths)} token lengths for {len(store)} cells; count them again")
        encoder = encoder_for(store, vocabulary, max_length)
        self.cells: np.ndarray | CellSet
        if isinstance(cells, CellSet):
            self.cells = cells.having(lengths)
        else:
            cells = np.asarray(cells, np.int64)
            self.cells = cells[lengths[cells] > 0]
        self.skipped = len(cells) - len(self.cells)
        if not len(self.cells):
            what = "held out" if validation else "to train on"
            raise DataError(
                f"{store.path}: no cell {what} has a gene that vocabulary {vocabulary.name} knows; check both"
            )
        self.store, self.lengths = store, lengths
        self.global_batch, self.token_budget, self.seed = global_batch, token_budget, seed
        self.rank, self.ranks, self.validation, self.order = rank, ranks, validation, order or Shuffled()
        self._packer = Packer(encoder, masking or MaskSettings(), multiple_of)
        stream_key(seed, 0, TRAINING)  # a wrong seed is refused here, not at the first step

    @property
    def steps_per_epoch(self) -> int:
        """Steps until every cell has been seen once; the last one may run on into the next epoch."""
        return -(-len(self.cells) // self.global_batch)

    def step(self, k: int) -> list[MicroBatch]:
        """Return this rank's micro-batches of global batch ``k``.

        In training every rank has at least one. Of the last, short batch of a validation a rank may have none.

        Raises
        ------
        DataError
            A cell could not be read or does not fit its recorded length; names the cells.
        UsageError
            A step below 0, or beyond the end of a validation.
        """
        if k < 0 or (self.validation and k >= self.steps_per_epoch):
            raise UsageError(f"step {k} is outside the {self.steps_per_epoch} steps of a validation, or below 0")
        cells, epochs = self._global_batch(k)
        lengths = self._packer.encoder.input_lengths(self.lengths[cells])
        mine = np.flatnonzero(share_out(lengths, self.ranks) == self.rank)
        parts = [mine[part] for part in micro_batches(lengths[mine], self.token_budget)]
        keys = self._keys(epochs)
        made: list[MicroBatch] = []
        for begin, end in ranges_within(np.array([lengths[part].sum() for part in parts]), TOKENS_AT_ONCE):
            first, these = np.cumsum([0, *map(len, parts[begin:end])]), np.concatenate(parts[begin:end])
            made += self._micro_batches(k, cells[these], keys[these], lengths[these], first)
        return made

    def evenness(self, k: int) -> tuple[float, float]:
        """Return the imbalance and the fill of step ``k``, from lengths alone.

        Returns
        -------
        imbalance : float
            By which share the fullest rank's tokens exceed the mean of all ranks'.
        fill : float
            Real tokens of those computed, over all ranks.
        """
        cells, _ = self._global_batch(k)
        lengths = self._packer.encoder.input_lengths(self.lengths[cells])
        rank_of, multiple = share_out(lengths, self.ranks), self._packer.multiple_of
        load = np.bincount(rank_of, weights=lengths, minlength=self.ranks)
        packs = [p for r in range(self.ranks) for p in _pack_tokens(lengths[rank_of == r], self.token_budget)]
        computed = sum(-(-tokens // multiple) * multiple for tokens in packs)
        return float(load.max() / load.mean() - 1), float(load.sum() / computed)

    def state_dict(self, step: int) -> dict[str, int | str]:
        """Return what has to be kept for going on at ``step``: a few integers and the store's generation."""
        return {
            "step": step,
            "seed": self.seed,
            "global_batch": self.global_batch,
            "cells": len(self.cells),
            "generation": self.store.generation,
            "store": self.store.digest,
        }

    def step_of(self, state: dict[str, int | str]) -> int:
        """Return the step to go on at.

        Raises
        ------
        UsageError
            The state is that of another store, generation, seed, batch size or choice of cells; names the difference.
        """
        for name, now in self.state_dict(int(state["step"])).items():
            if state.get(name) != now:
                raise UsageError(
                    f"{self.store.path}: the state was kept with {name} {state.get(name)}, here it is {now}; "
                    "go on with the same, or start anew"
                )
        return int(state["step"])

    def _global_batch(self, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the global numbers of a step's cells and the epoch of each, int64."""
        if self.validation:
            cells = self.cells[k * self.global_batch : (k + 1) * self.global_batch]
            return cells, np.zeros(len(cells), np.int64)
        which, epochs = global_batch(k, self.global_batch, len(self.cells), self.seed, self.order)
        return self.cells[which], epochs

    def _keys(self, epochs: np.ndarray) -> np.ndarray:
        """Return the key of each cell's random numbers, uint32 [n, 2]."""
        stream = VALIDATION if self.validation else TRAINING
        different, which = np.unique(epochs, return_inverse=True)
        return np.array([stream_key(self.seed, epoch, stream) for epoch in different.tolist()])[which]

    def _micro_batches(
        self, k: int, cells: np.ndarray, keys: np.ndarray, lengths: np.ndarray, first: np.ndarray
    ) -> list[MicroBatch]:
        try:
            return self._packer.packs(self._packer.gather(self.store, cells), cells, keys, first, lengths)
        except (MegacellError, ArithmeticError, LookupError, OSError, ValueError, TypeError, MemoryError) as error:
            blamed = self._failing(cells, lengths)
            named = ", ".join(map(str, blamed[:8])) + (f" and {len(blamed) - 8} more" if len(blamed) > 8 else "")
            raise DataError(f"{self.store.path}: step {k}, cells {named}: {error}") from error

    def _failing(self, cells: np.ndarray, lengths: np.ndarray) -> list[int]:
        """Return the cells that fail by themselves; all, where none does."""
        failing = []
        for cell, length in zip(cells.tolist(), lengths.tolist(), strict=True):
            try:
                batch = self._packer.pack(self._packer.gather(self.store, np.array([cell])), np.array([cell]))
                if batch.n_tokens != length:
                    failing.append(cell)
            except (MegacellError, ArithmeticError, LookupError, OSError, ValueError, TypeError, MemoryError):
                failing.append(cell)
        return failing or cells.tolist()

    def prefetched(
        self, first: int, last: int | None = None, *, threads: int, depth: int
    ) -> Prefetched[list[MicroBatch]]:
        """Return an iterator over the micro-batches of steps first … last - 1 (endless without last), made ahead.

        Parameters
        ----------
        first, last : int
            Steps of this stream; a validation ends by itself.
        threads, depth : int
            Threads in the background, and how many steps each is ahead; see `Prefetched`.
        """
        if self.validation:
            last = self.steps_per_epoch if last is None else min(last, self.steps_per_epoch)
        return Prefetched(self.step, first, last, threads=threads, depth=depth)
