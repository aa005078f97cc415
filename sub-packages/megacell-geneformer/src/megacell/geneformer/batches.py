# SPDX-License-Identifier: Apache-2.0
"""From cells in the store to micro-batches: gathered, ranked, packed and masked in a few compiled passes.

``BatchStream.step(k)`` is a pure function of k: which cells, which of them are this rank's, their tokens and masks
follow from the seed alone, so a run may be resumed at any step, and with another number of ranks.
"""

from dataclasses import dataclass

import numpy as np

from megacell.geneformer.buffers import Pool, WorkingRoom
from megacell.geneformer.cell_sets import CellSet
from megacell.geneformer.compiling import compiled
from megacell.geneformer.loader import Prefetched
from megacell.geneformer.masking import TRAINING, VALIDATION, MaskSettings, Rules, mask_cells, stream_key
from megacell.geneformer.order import Order, Shuffled, global_batch, micro_batches, share_out
from megacell.geneformer.ranking import RankEncoder, RowsOfStore
from megacell.geneformer.token_folder import encoder_for
from megacell.geneformer.vocabulary import Vocabulary
from megacell.store import CellStore
from megacell.store.errors import DataError, MegacellError, UsageError

Rows = tuple[np.ndarray, np.ndarray, np.ndarray]
NO_KEYS = np.zeros((0, 2), np.uint32)


@dataclass(frozen=True, eq=False)
class MicroBatch:
    """Packed cells (C cells, T tokens, M of them chosen for prediction).

    Attributes
    ----------
    tokens : np.ndarray, int32 [T]
        Cell after cell without padding between; T is rounded up with pad tokens at the end.
    positions : np.ndarray, int32 [T]
        Place of each token within its cell, 0 for pad tokens.
    cu_seqlens : np.ndarray, int32 [C + 1 or C + 2]
        Sequence i is ``tokens[cu_seqlens[i]:cu_seqlens[i + 1]]``; pad tokens, if any, are one last sequence.
    max_seqlen : int
        Longest sequence, the pad tokens' included.
    masked : np.ndarray, int32 [M]
        Places in ``tokens`` that were chosen, ascending, whatever became of the token.
    labels : np.ndarray, int32 [M]
        The tokens that stood there.
    cells : np.ndarray, int64 [C]
        Global cell numbers.
    n_tokens : int
        Real tokens: T without pad tokens.
    """

    tokens: np.ndarray
    positions: np.ndarray
    cu_seqlens: np.ndarray
    max_seqlen: int
    masked: np.ndarray
    labels: np.ndarray
    cells: np.ndarray
    n_tokens: int


@compiled
def _finish(
    packed: tuple[np.ndarray, np.ndarray],
    cells: tuple[np.ndarray, np.ndarray],
    rules: Rules,
    positions: np.ndarray,
    ends: np.ndarray,
    predicted: tuple[np.ndarray, np.ndarray],
) -> tuple[int, int]:
    """Number positions, write where sequences end, mask where there are keys; return longest and number chosen."""
    tokens, cu_lengths = packed
    n = len(cu_lengths) - 1
    longest = len(tokens) - cu_lengths[n]
    ends[0], ends[-1] = 0, len(tokens)
    for i in range(n):
        row = positions[cu_lengths[i] : cu_lengths[i + 1]]
        for j in range(len(row)):
            row[j] = j
        ends[i + 1] = cu_lengths[i + 1]
        longest = max(longest, len(row))
    for j in range(cu_lengths[n], len(tokens)):
        positions[j] = 0
    return longest, mask_cells(packed, cells, rules, predicted[0], predicted[1]) if len(cells[1]) else 0


class Packer:
    """Makes micro-batches from rows of counts.

    Parameters
    ----------
    encoder : RankEncoder
    masking : MaskSettings
    multiple_of : int
        The pack's length is rounded up to a multiple of this.
    """

    def __init__(self, encoder: RankEncoder, masking: MaskSettings, multiple_of: int = 1) -> None:
        vocabulary = encoder.vocabulary
        self.encoder, self.multiple_of = encoder, multiple_of
        is_gene = np.zeros(vocabulary.size, bool)
        is_gene[vocabulary.gene_tokens] = True
        self._rules = masking.thresholds(), vocabulary.gene_tokens, is_gene, vocabulary.specials["mask"]
        self._work, self._pool = WorkingRoom(), Pool()

    def gather(self, store: CellStore, cells: np.ndarray) -> "Rows | RowsOfStore":
        """Return the rows of ``cells`` for `pack`: in place where they can be read there, else copied.

        Copies are valid until this thread gathers the next.
        """
        if isinstance(store, CellStore) and (rows := store.rows_in_place(cells)) is not None:
            return RowsOfStore(store, rows)
        return store.gather(cells, empty=lambda size, dtype: self._work.get(f"gathered {dtype}", size, dtype))

    def pack(self, rows: "Rows | RowsOfStore", cells: np.ndarray, keys: np.ndarray | None = None) -> MicroBatch:
        """Rank, pack and mask.

        Parameters
        ----------
        rows : (indptr, genes, counts) or RowsOfStore
            As `RankEncoder.encode` takes them, or of `gather`.
        cells : int64 [C]
            The rows' global cell numbers.
        keys : uint32 [C, 2], optional
            `stream_key` of each; without, nothing is masked.
        """
        rooms: list[np.ndarray] = []

        def empty(size: int, dtype: type) -> np.ndarray:
            """Take one piece of memory for all that is as long as the tokens."""
            rooms.extend(self._pool.empty(4 * size, dtype).reshape(4, size))
            return rooms[0]

        if isinstance(rows, RowsOfStore):
            tokens, cu_lengths = self.encoder.encode_in_place(rows, multiple_of=self.multiple_of, empty=empty)
        else:
            tokens, cu_lengths = self.encoder.encode(*rows, multiple_of=self.multiple_of, empty=empty)
        size, n_tokens = len(tokens), int(cu_lengths[-1])
        positions, masked, labels = rooms[1][:size], rooms[2], rooms[3]
        ends = np.empty(len(cu_lengths) + (n_tokens < size), np.int32)
        longest, chosen = _finish(
            (tokens, cu_lengths), (cells, NO_KEYS if keys is None else keys), self._rules, positions, ends,
            (masked, labels),
        )  # fmt: skip
        return MicroBatch(
            tokens=tokens,
            positions=positions,
            cu_seqlens=ends,
            max_seqlen=longest,
            masked=masked[:chosen],
            labels=labels[:chosen],
            cells=cells,
            n_tokens=n_tokens,
        )


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
        return [self._micro_batch(k, cells[part], epochs[part], lengths[part]) for part in parts]

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

    def _micro_batch(self, k: int, cells: np.ndarray, epochs: np.ndarray, lengths: np.ndarray) -> MicroBatch:
        stream = VALIDATION if self.validation else TRAINING
        different, which = np.unique(epochs, return_inverse=True)
        keys = np.stack([stream_key(self.seed, epoch, stream) for epoch in different.tolist()])[which]
        try:
            batch = self._packer.pack(self._packer.gather(self.store, cells), cells, keys)
            if not np.array_equal(np.diff(batch.cu_seqlens)[: len(cells)], lengths):
                raise DataError("their lengths are not those recorded for this store and vocabulary; count them again")
        except (MegacellError, ArithmeticError, LookupError, OSError, ValueError, TypeError, MemoryError) as error:
            blamed = self._failing(cells, lengths)
            named = ", ".join(map(str, blamed[:8])) + (f" and {len(blamed) - 8} more" if len(blamed) > 8 else "")
            raise DataError(f"{self.store.path}: step {k}, cells {named}: {error}") from error
        return batch

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
