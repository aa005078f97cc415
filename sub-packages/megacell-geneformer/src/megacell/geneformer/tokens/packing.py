# SPDX-License-Identifier: Apache-2.0
"""Rows of counts become micro-batches: ranked, laid out one cell after the other, masked, in a few compiled passes."""

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from megacell.core.buffers import Pool, Workspace
from megacell.core.errors import DataError
from megacell.core.jit import compiled
from megacell.geneformer.tokens.encoder import CellEncoder
from megacell.geneformer.tokens.masking import MaskSettings, Rules, mask_cells
from megacell.geneformer.vocabulary.vocabulary import Vocabulary
from megacell.store.read.reader import CellReader, Rows

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

    @property
    def n_items(self) -> int:
        """How many positions were chosen for prediction, M: so many losses a network computes."""
        return len(self.masked)


@compiled
def _finish(
    ranked: tuple[np.ndarray, np.ndarray],
    packs: tuple[np.ndarray, np.ndarray],
    cells: tuple[np.ndarray, np.ndarray],
    rules: Rules,
    pad: int,
    out: np.ndarray,
    ends: np.ndarray,
    facts: np.ndarray,
) -> None:
    """Lay ranked cells out as packs, number their positions and mask them, where there are keys.

    Parameters
    ----------
    ranked : (tokens, cu_lengths)
        int32, cell after cell; int64 [n + 1].
    packs : (first, starts)
        int64 [packs + 1]: the first cell of each, and where it begins in ``out``.
    cells, rules
        As for `mask_cells`; no keys at all to mask nothing.
    pad : int
    out : int32 [4, T]
        Receives tokens, positions, places that were chosen and what stood there.
    ends : int32 [n + 2 packs]
        Receives where sequences end, from 0 on: pack b's from ``first[b] + 2 b`` on.
    facts : int64 [packs, 2]
        Receives the longest sequence, and how many places were chosen.
    """
    (ranked_tokens, cu_lengths), (first, starts), (numbers, keys) = ranked, packs, cells
    for b in range(len(facts)):
        a, z, at = first[b], first[b + 1], starts[b]
        bounds = cu_lengths[a : z + 1] - cu_lengths[a]
        n_tokens, size = bounds[z - a], starts[b + 1] - at
        tokens, positions = out[0, at : at + size], out[1, at : at + size]
        tokens[:n_tokens] = ranked_tokens[cu_lengths[a] : cu_lengths[z]]
        tokens[n_tokens:], positions[n_tokens:] = pad, 0
        longest, own_ends = size - n_tokens, ends[a + 2 * b :]
        own_ends[0], own_ends[z - a + 1] = 0, size
        for i in range(z - a):
            row = positions[bounds[i] : bounds[i + 1]]
            for j in range(len(row)):
                row[j] = j
            own_ends[i + 1] = bounds[i + 1]
            longest = max(longest, len(row))
        facts[b, 0], facts[b, 1] = longest, 0
        if len(keys):
            packed, known_by = (tokens, bounds), (numbers[a:z], keys[a:z])
            facts[b, 1] = mask_cells(packed, known_by, rules, out[2, at : at + size], out[3, at : at + size])


class Packer:
    """Makes micro-batches of cells.

    Parameters
    ----------
    encoder : CellEncoder
    masking : MaskSettings
    multiple_of : int
        The pack's length is rounded up to a multiple of this.
    """

    def __init__(self, encoder: CellEncoder, masking: MaskSettings, multiple_of: int = 1) -> None:
        vocabulary = encoder.vocabulary
        self.encoder, self.multiple_of = encoder, multiple_of
        is_gene = np.zeros(vocabulary.size, bool)
        is_gene[vocabulary.gene_tokens] = True
        self._rules = masking.thresholds(), vocabulary.gene_tokens, is_gene, vocabulary.specials["mask"]
        self._pad = vocabulary.specials["pad"]
        self._workspace, self._pool = Workspace(), Pool()

    def pack(self, rows: Rows, cells: np.ndarray) -> MicroBatch:
        """Encode rows as `CellReader.gather` returns them, pack them as cells of these numbers, and mask nothing."""
        encoded = self.encoder.encode(*rows, allocate=self._allocate)
        return self._lay_out(encoded, cells, NO_KEYS, np.array([0, len(cells)]))[0]

    def packs(
        self,
        reader: CellReader,
        cells: np.ndarray,
        keys: np.ndarray,
        first: np.ndarray,
        lengths: np.ndarray | None = None,
    ) -> list[MicroBatch]:
        """Encode, pack and mask several micro-batches at once: between compiled loops threads wait for each other.

        Parameters
        ----------
        reader : CellReader
        cells : int64 [C]
            Global cell numbers, micro-batch after micro-batch.
        keys : uint32 [C, 2]
            `stream_key` of each; none at all to mask nothing.
        first : int64 [micro-batches + 1]
            The first cell of each; the last is C.
        lengths : int64 [C], optional
            The tokens that each cell is known to have.

        Raises
        ------
        DataError
            Cells have other lengths than these.
        """
        encoded = self.encoder.encode_cells(reader, cells, allocate=self._allocate)
        if lengths is not None and not np.array_equal(np.diff(encoded[1]), lengths):
            raise DataError("their lengths are not those recorded for this store and vocabulary; count them again")
        return self._lay_out(encoded, cells, keys, first)

    def _allocate(self, size: int, dtype: Any) -> np.ndarray:
        return self._workspace.get("encoded", size, dtype)

    def _lay_out(
        self, encoded: tuple[np.ndarray, np.ndarray], cells: np.ndarray, keys: np.ndarray, first: np.ndarray
    ) -> list[MicroBatch]:
        """Return encoded cells as micro-batches, masked where there are keys."""
        n_tokens = np.diff(encoded[1][first])
        starts = np.zeros(len(first), np.int64)
        np.cumsum(-(-n_tokens // self.multiple_of) * self.multiple_of, out=starts[1:])
        size = int(starts[-1])
        out = self._pool.allocate(4 * size, np.int32).reshape(4, size)
        ends, facts = np.empty(len(cells) + 2 * len(n_tokens), np.int32), np.empty((len(n_tokens), 2), np.int64)
        _finish(encoded, (first, starts), (cells, keys), self._rules, self._pad, out, ends, facts)
        return [
            MicroBatch(
                tokens=out[0, at:until],
                positions=out[1, at:until],
                cu_seqlens=ends[a + 2 * b : z + 2 * b + 1 + (tokens < until - at)],
                max_seqlen=longest,
                masked=out[2, at : at + chosen],
                labels=out[3, at : at + chosen],
                cells=cells[a:z],
                n_tokens=tokens,
            )
            for b, ((a, z), (at, until), tokens, (longest, chosen)) in enumerate(
                zip(pairwise(first.tolist()), pairwise(starts.tolist()), n_tokens.tolist(), facts.tolist(), strict=True)
            )
        ]


def gene_tokens(batch: MicroBatch, vocabulary: Vocabulary) -> tuple[np.ndarray, np.ndarray]:
    """Return a micro-batch's true gene tokens without specials (int32 flat), and where each cell starts (int64)."""
    tokens = batch.tokens.copy()
    tokens[batch.masked] = batch.labels
    starts = batch.cu_seqlens[: len(batch.cells) + 1].astype(np.int64)
    inside = np.zeros(len(tokens), bool)
    inside[: starts[-1]] = True
    for k in range(len(vocabulary.prefix)):
        inside[starts[:-1] + k] = False
    for k in range(len(vocabulary.suffix)):
        inside[starts[1:] - 1 - k] = False
    lengths = np.diff(starts) - len(vocabulary.prefix) - len(vocabulary.suffix)
    return tokens[inside].astype(np.int32), np.concatenate([[0], np.cumsum(lengths)])


def masked_ranks(batch: MicroBatch, vocabulary: Vocabulary) -> tuple[np.ndarray, np.ndarray]:
    """Return, for each masked position, its rank among its cell's genes and the cell's number of genes (int64)."""
    starts = batch.cu_seqlens[: len(batch.cells) + 1].astype(np.int64)
    genes = np.diff(starts) - len(vocabulary.prefix) - len(vocabulary.suffix)
    cell = np.searchsorted(starts, batch.masked, side="right") - 1
    return batch.masked - starts[cell] - len(vocabulary.prefix), genes[cell]
