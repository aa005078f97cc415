# SPDX-License-Identifier: Apache-2.0
"""Gene frequency and rank frequency: the masked-gene task when nothing in the cell but a position is looked at.

Both are fitted once on training cells and evaluated at exactly the positions at which the network is. A cell is the
list of its gene tokens by descending value (rank value encoding); specials such as ``<cls>`` are removed by the
caller, here and everywhere in this module. The count-arithmetic baseline, which does look at the cell, is in
`megacell.geneformer.count_arithmetic`.
"""

from collections.abc import Mapping
from typing import Self

import numpy as np
import numpy.typing as npt

from megacell.core.errors import DataError
from megacell.core.jit import compiled

RANK_BINS = 25
PSEUDOCOUNT = 0.5  # a gene that no training cell shows is as frequent as half a token
RANK_WEIGHTS = 20.0 * 10.0 ** np.arange(6)  # tokens' worth of the overall frequency in a rank bin, to choose from


class TokenFrequency:
    """How often each gene stands in training cells, overall and by relative rank; filled incrementally.

    The model of `frequency_nats` is ``p(gene) = (tokens of the gene + 0.5) / sum over genes of the same``. That of
    `rank_frequency_nats` is ``p(gene | bin) = (tokens of the gene in the bin + w p(gene)) / (tokens in the bin + w)``
    with 25 bins of relative rank, ``bin = position * 25 // genes in the cell``, and w the weight under which the
    training tokens, each left out in its turn, are likeliest. Specials have probability zero in both.

    Parameters
    ----------
    size : int
        Vocabulary size: the largest token + 1.
    gene_tokens : int array [G]
        All tokens that are genes, ascending.

    Attributes
    ----------
    cells : int
        Cells added so far, counting only those with at least one gene.
    token_counts : int64 [size]
        Training tokens of each gene; as a gene stands at most once in a cell, also the cells that show it.
    rank_counts : int64 [25, size]
        The same by bin of relative rank.
    """

    def __init__(self, size: int, gene_tokens: npt.ArrayLike) -> None:
        self.size = size
        self.gene_tokens = np.asarray(gene_tokens, dtype=np.int32)
        if self.gene_tokens.size == 0 or self.gene_tokens.min() < 0 or self.gene_tokens.max() >= size:
            raise ValueError(f"gene_tokens must hold tokens of a vocabulary of {size}, and at least one")
        self.is_gene = np.zeros(size, dtype=bool)
        self.is_gene[self.gene_tokens] = True
        self.cells = 0
        self.rank_counts = np.zeros((RANK_BINS, size), dtype=np.int64)
        self._probabilities: tuple[np.ndarray, np.ndarray] | None = None

    @property
    def token_counts(self) -> np.ndarray:
        """Training tokens of each gene, int64 [size]."""
        counts: np.ndarray = self.rank_counts.sum(axis=0)
        return counts

    def add(self, tokens: np.ndarray, cu_lengths: np.ndarray) -> None:
        """Count training cells.

        Parameters
        ----------
        tokens : int32 [T]
            Gene tokens of the cells one after the other, each cell by descending value.
        cu_lengths : int64 [cells + 1]
            Cell i holds ``tokens[cu_lengths[i]:cu_lengths[i + 1]]``; an empty cell is skipped.

        Raises
        ------
        ValueError
            A token is not a gene, or the offsets do not cover the tokens.
        """
        tokens, cu_lengths = np.asarray(tokens), np.asarray(cu_lengths, dtype=np.int64)
        self.check(tokens, cu_lengths)
        _count_ranks(tokens, cu_lengths, self.rank_counts)
        self.cells += int(np.count_nonzero(np.diff(cu_lengths)))
        self._probabilities = None

    def probabilities(self) -> tuple[np.ndarray, np.ndarray]:
        """The two fitted distributions over tokens.

        Returns
        -------
        frequency : float64 [size]
            p(gene), zero for specials.
        rank_frequency : float64 [25, size]
            p(gene | bin of relative rank), zero for specials; each row sums to one.
        """
        if self._probabilities is None:
            frequency = np.where(self.is_gene, self.token_counts + PSEUDOCOUNT, 0.0)
            frequency /= frequency.sum()
            ranked = self.rank_counts + self._best_weight(frequency) * frequency
            self._probabilities = frequency, ranked / ranked.sum(axis=1, keepdims=True)
        return self._probabilities

    def _best_weight(self, frequency: np.ndarray) -> float:
        """Return the weight of the overall frequency that leave-one-out likelihood prefers."""
        bins, tokens = np.nonzero(self.rank_counts)
        counts = self.rank_counts[bins, tokens]
        others = self.rank_counts.sum(axis=1)[bins] - 1
        likelihoods = [
            (counts * np.log((counts - 1 + weight * frequency[tokens]) / (others + weight))).sum()
            for weight in RANK_WEIGHTS
        ]
        return float(RANK_WEIGHTS[int(np.argmax(likelihoods))])

    def frequency_nats(self, true_tokens: np.ndarray) -> np.ndarray:
        """Loss of gene frequency alone.

        Parameters
        ----------
        true_tokens : int [M]
            The genes that truly stand at the chosen positions.

        Returns
        -------
        float64 [M]
            -log p(true token) in nats.
        """
        self.check(true_tokens)
        nats: np.ndarray = -np.log(self.probabilities()[0][true_tokens])
        return nats

    def rank_frequency_nats(self, true_tokens: np.ndarray, position: np.ndarray, n_genes: np.ndarray) -> np.ndarray:
        """Loss of gene frequency at that relative rank.

        Parameters
        ----------
        true_tokens : int [M]
            The genes that truly stand at the chosen positions.
        position : int [M]
            Those positions, counted from 0 among the cell's gene tokens.
        n_genes : int [M]
            Gene tokens in the cell of each.

        Returns
        -------
        float64 [M]
            -log p(true token | bin of relative rank) in nats.
        """
        self.check(true_tokens)
        position, n_genes = np.asarray(position, dtype=np.int64), np.asarray(n_genes, dtype=np.int64)
        if np.any((position < 0) | (position >= n_genes)):
            raise ValueError("a position lies outside its cell: count positions from 0 among the cell's gene tokens")
        nats: np.ndarray = -np.log(self.probabilities()[1][position * RANK_BINS // n_genes, true_tokens])
        return nats

    def likeliest(self, position: np.ndarray, n_genes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the token of highest probability at each position, overall and at that relative rank, int [M] each."""
        frequency, ranked = self.probabilities()
        bins = np.asarray(position, dtype=np.int64) * RANK_BINS // np.asarray(n_genes, dtype=np.int64)
        return np.full(len(bins), frequency.argmax()), ranked.argmax(axis=1)[bins]

    def to_arrays(self) -> dict[str, np.ndarray]:
        """What has to be kept to make this object again, e.g. by ``np.savez(path, **frequency.to_arrays())``.

        Returns
        -------
        dict
            ``gene_tokens`` int32 [G], ``rank_counts`` int64 [25, size], ``cells`` int64 [].
        """
        return {"gene_tokens": self.gene_tokens, "rank_counts": self.rank_counts, "cells": np.array(self.cells)}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray]) -> Self:
        """Make the object again from `to_arrays`, or from the open ``.npz`` file that keeps them.

        Raises
        ------
        DataError
            An array is absent or has another shape or type than `to_arrays` gives.
        """
        absent = {"gene_tokens", "rank_counts", "cells"} - set(arrays)
        if absent:
            raise DataError(f"gene frequencies lack {', '.join(sorted(absent))}: fit them again on the training cells")
        genes, ranks, cells = (np.asarray(arrays[name]) for name in ("gene_tokens", "rank_counts", "cells"))
        shaped = ranks.ndim == 2 and len(ranks) == RANK_BINS and genes.ndim == 1 and genes.size and cells.ndim == 0
        if (
            not shaped
            or any(a.dtype.kind != "i" for a in (genes, ranks, cells))
            or not 0 <= genes.min() <= genes.max() < ranks.shape[1]
        ):
            raise DataError(
                f"gene frequencies have shapes {genes.shape}, {ranks.shape} and {cells.shape} where [genes], "
                f"[{RANK_BINS}, vocabulary size] and [] of whole numbers belong: fit them again on the training cells"
            )
        frequency = cls(ranks.shape[1], genes)
        frequency.rank_counts[:] = ranks
        frequency.cells = int(cells)
        return frequency

    def check(self, tokens: np.ndarray, cu_lengths: np.ndarray | None = None) -> None:
        """Refuse tokens that are not genes, and offsets that do not cover the tokens.

        Raises
        ------
        ValueError
            One of the two holds; a fault of the caller, not of a user's data.
        """
        tokens = np.asarray(tokens)
        if tokens.size and (tokens.min() < 0 or tokens.max() >= self.size or not self.is_gene[tokens].all()):
            raise ValueError("a token is not a gene of the vocabulary: remove specials and padding first")
        if cu_lengths is None:
            return
        steps = np.diff(cu_lengths, prepend=0, append=tokens.size)  # of a right one, the first and the last are 0
        if steps.size < 2 or steps[0] or steps[-1] or steps.min() < 0:
            raise ValueError(f"cu_lengths must rise from 0 to the number of tokens, {tokens.size}")


def frequency_log_prior(frequency: TokenFrequency) -> np.ndarray:
    """Log of the smoothed gene frequency: the LM head's bias starts from it, and training spends no steps on it.

    Returns
    -------
    float64 [size]
        log p(gene) in nats; specials get the least value of any gene, so that the bias stays finite.
    """
    probability = frequency.probabilities()[0]
    return np.log(np.where(frequency.is_gene, probability, probability[frequency.gene_tokens].min()))


@compiled
def _count_ranks(tokens, cu_lengths, rank_counts):
    """Add each token to its bin of relative rank."""
    for cell in range(len(cu_lengths) - 1):
        start, end = cu_lengths[cell], cu_lengths[cell + 1]
        for place in range(start, end):
            rank_counts[(place - start) * RANK_BINS // (end - start), tokens[place]] += 1
