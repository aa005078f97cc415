# SPDX-License-Identifier: Apache-2.0
"""What `megacell bench batches` is measured against: a dictionary look-up a gene, and plain numpy a cell.

The first follows what is told of BioNeMo's collator: each gene of a cell is looked up in dictionaries, in Python. Both
read counts from memory, where ours come from the store; both make the same tokens as ours, and mask at the same rate.
"""

import random

import numpy as np
import scipy.sparse as sp

from megacell.geneformer.tokens.masking import MaskSettings
from megacell.geneformer.vocabulary.vocabulary import Vocabulary
from megacell.store import CellStore

Row = tuple[np.ndarray, np.ndarray]
RULES = MaskSettings()


class References:
    """Both references, for cells of a store.

    Parameters
    ----------
    store : CellStore
    vocabulary : Vocabulary
    cells : int64 [n]
        Whose counts are held in memory.
    max_length : int
        Longest cell in tokens, specials included.
    """

    def __init__(self, store: CellStore, vocabulary: Vocabulary, cells: np.ndarray, max_length: int) -> None:
        self.tokens = vocabulary.tokens_of(store.gene_ids, store.symbols)
        matrix = self._summed(store.rows(cells))
        self.rows = [
            (matrix.indices[a:b], matrix.data[a:b]) for a, b in zip(matrix.indptr, matrix.indptr[1:], strict=False)
        ]
        self.prefix, self.suffix = list(vocabulary.prefix), list(vocabulary.suffix)
        self.room = max_length - len(self.prefix) - len(self.suffix)
        median_of_token = np.ones(vocabulary.size)
        median_of_token[vocabulary.tokens] = vocabulary.medians
        self.medians = np.where(self.tokens >= 0, median_of_token[self.tokens], 1.0)
        self.gene_ids = list(store.gene_ids)
        self.token_of = {gene: int(t) for gene, t in zip(self.gene_ids, self.tokens, strict=True) if t >= 0}
        self.median_of = {gene: float(median_of_token[token]) for gene, token in self.token_of.items()}
        self.genes, self.gene_list = vocabulary.gene_tokens, vocabulary.gene_tokens.tolist()
        self.mask, self.specials = vocabulary.specials["mask"], set(vocabulary.specials.values())
        self.rng = np.random.default_rng(0)

    def _summed(self, matrix: "sp.csr_matrix") -> "sp.csr_matrix":
        """Sum genes that share a token, which the references do not do themselves."""
        known, columns = self.tokens >= 0, np.arange(len(self.tokens))
        _, first, which = np.unique(self.tokens[known], return_index=True, return_inverse=True)
        columns[known] = columns[known][first][which]
        matrix = type(matrix)((matrix.data, columns[matrix.indices], matrix.indptr), matrix.shape)
        matrix.sum_duplicates()
        return matrix

    def dictionary_cell(self, row: Row) -> list[int]:
        """Rank one cell with a dictionary look-up a gene."""
        total = float(row[1].sum(dtype=np.float64))
        values = []
        for gene, count in zip(row[0].tolist(), row[1].tolist(), strict=True):
            gene_id = self.gene_ids[gene]
            if gene_id in self.token_of:
                value = count / total * 10_000 / self.median_of[gene_id]
                values.append((-value, self.token_of[gene_id]))
        values.sort()
        return [*self.prefix, *(token for _, token in values[: self.room]), *self.suffix]

    def dictionary_mask(self, tokens: list[int]) -> list[int]:
        """Mask one cell, token by token."""
        out = []
        for token in tokens:
            if token not in self.specials and random.random() < RULES.rate:
                kind = random.random()
                drawn = random.choice(self.gene_list) if kind < RULES.mask + RULES.random else token
                token = self.mask if kind < RULES.mask else drawn
            out.append(token)
        return out

    def numpy_cell(self, row: Row) -> np.ndarray:
        """Rank one cell with arrays."""
        token = self.tokens[row[0]]
        known = token >= 0
        token = token[known]
        value = row[1][known] / row[1].sum(dtype=np.float64) * 10_000 / self.medians[row[0][known]]
        ranked = token[np.lexsort((token, -value))][: self.room]
        return np.concatenate([self.prefix, ranked, self.suffix]).astype(np.int64)

    def numpy_mask(self, tokens: np.ndarray) -> np.ndarray:
        """Mask one cell with arrays."""
        chosen = self.rng.random(len(tokens)) < RULES.rate
        chosen[: len(self.prefix)] = chosen[len(tokens) - len(self.suffix) :] = False
        kind = self.rng.random(len(tokens))
        tokens = np.where(chosen & (kind < RULES.mask), self.mask, tokens)
        drawn = chosen & (kind >= RULES.mask) & (kind < RULES.mask + RULES.random)
        return np.where(drawn, self.rng.choice(self.genes, len(tokens)), tokens)

    def some(self, k: int, n: int) -> list[Row]:
        """Return n cells' counts, others for another k."""
        return self.rows[k * n % len(self.rows) :][:n]

    def by_dictionary(self, k: int) -> int:
        """Rank, mask and pack a few cells; return how many."""
        part = self.some(k, 8)
        np.concatenate([self.dictionary_mask(self.dictionary_cell(row)) for row in part])
        return len(part)

    def by_numpy(self, k: int) -> int:
        """Rank, mask and pack some cells; return how many."""
        part = self.some(k, 64)
        np.concatenate([self.numpy_mask(self.numpy_cell(row)) for row in part])
        return len(part)
