# SPDX-License-Identifier: Apache-2.0
"""Masked-language-model corruption as a pure function of (seed, epoch, stream, global cell number, position).

Random numbers come from Philox4x32-10, a counter-based generator (Salmon, Moraes, Dror, Shaw: "Parallel random
numbers: as easy as 1, 2, 3", SC11): a keyed function of a counter, without a state. So what is masked in a cell never
depends on its neighbours in a batch, on workers, ranks, or on where a run was resumed. The one definition:

- key: the first two words of Philox(counter = (epoch, 0, stream, 0), key = seed), see `stream_key`;
- position p of a cell (specials counted) is chosen when word p % 4 of Philox(counter = (cell low, cell high, p // 4,
  0)) lies under rate x 2^32 and the token is a gene's;
- the rate may be dynamic, one for each cell: rate + (rate_to - rate) x (first word of Philox(counter = (cell low, cell
  high, 0, 3))) / 2^32;
- what becomes of it: (kind, high, low, _) = Philox(counter = (cell low, cell high, p, 1)); kind under mask x 2^32: the
  mask token; else under (mask + random) x 2^32: gene number (high x 2^32 + low) x G / 2^64 of the G gene tokens; else
  the token stays.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from megacell.core.errors import UsageError
from megacell.core.jit import compiled
from megacell.core.rng import philox

_HALF = np.uint64(32)
LANES = 32  # positions drawn at once: loops without a rest are vectorised to their end
Rules = tuple[np.ndarray, np.ndarray, np.ndarray, int]


@dataclass(frozen=True)
class MaskSettings:
    """Which share of the gene tokens is chosen, and what becomes of those.

    Attributes
    ----------
    rate : float, default 0.15
        Probability that a gene token is chosen, each by itself (Bernoulli).
    mask : float, default 0.8
        Share of the chosen that become the mask token.
    random : float, default 0.1
        Share of the chosen that become any gene's token, uniformly; the rest stays as it is. (BERT: 0.8 and 0.1,
        Devlin et al. 2019; BioNeMo's Geneformer: 0.8 and 0.02.)
    rate_to : float, optional
        Draw each cell's rate uniformly from ``rate`` to this (a dynamic rate); the same for all by default.

    Raises
    ------
    UsageError
        A share outside 0…1, mask + random above 1, or rate_to below rate.
    """

    rate: float = 0.15
    mask: float = 0.8
    random: float = 0.1
    rate_to: float | None = None

    def __post_init__(self) -> None:
        if self.rate_to is not None and not self.rate <= self.rate_to <= 1:
            raise UsageError(f"masking: rate_to is {self.rate_to}; give a share from rate, {self.rate}, to 1, or null")
        for name in ("rate", "mask", "random"):
            if not 0 <= getattr(self, name) <= 1:
                raise UsageError(f"masking: {name} is {getattr(self, name)}; give a share from 0 to 1")
        if self.mask + self.random > 1 + 1e-9:
            raise UsageError(f"masking: mask {self.mask} and random {self.random} exceed 1 together; lower one")

    def thresholds(self) -> np.ndarray:
        """Return rate, mask, mask + random and by what the rate may rise as fractions of 2^32, uint64 [4]."""
        rise = 0.0 if self.rate_to is None else self.rate_to - self.rate
        shares = np.array([self.rate, self.mask, min(self.mask + self.random, 1.0), rise])
        return np.rint(shares * 2.0**32).astype(np.uint64)


@compiled
def _draw_words(length: int, cell: Any, key: np.ndarray, words: np.ndarray) -> None:
    """Write the word of each position of a cell; ``words`` holds `LANES` more."""
    low, high = np.uint32(cell), np.uint32(cell >> _HALF)
    for block in range((length + LANES - 1) // LANES * (LANES // 4)):
        a, b, c, d = philox(low, high, np.uint32(block), np.uint32(0), key[0], key[1])
        words[4 * block], words[4 * block + 1], words[4 * block + 2], words[4 * block + 3] = a, b, c, d


@compiled
def _choose(row: np.ndarray, words: np.ndarray, rate: Any, is_gene: np.ndarray, chosen: np.ndarray) -> int:
    """Write the positions of a cell that are chosen, and return how many; ``chosen`` holds one more."""
    found = 0
    for position in range(len(row)):  # without a branch: one in seven is chosen, which no processor can predict
        chosen[found] = position
        found += np.uint64(words[position]) < rate
    kept = 0
    for j in range(found):
        chosen[kept] = chosen[j]
        kept += is_gene[row[chosen[j]]]
    return kept


@compiled
def _draw_fates(
    n: int, cell: Any, key: np.ndarray, n_genes: int, chosen: np.ndarray, kinds: np.ndarray, drawn: np.ndarray
) -> None:
    """Write, for each of n chosen positions, the word that decides and the number of a random gene."""
    low, high, genes = np.uint32(cell), np.uint32(cell >> _HALF), np.uint64(n_genes)
    for j in range((n + LANES - 1) // LANES * LANES):
        kind, w1, w0, _ = philox(low, high, np.uint32(chosen[j]), np.uint32(1), key[0], key[1])
        kinds[j] = kind
        drawn[j] = (np.uint64(w1) * genes + ((np.uint64(w0) * genes) >> _HALF)) >> _HALF


@compiled
def _rate_of(cell: Any, key: np.ndarray, thresholds: np.ndarray) -> Any:
    """Return a cell's own rate, as a fraction of 2^32."""
    if thresholds[3] == 0:
        return thresholds[0]
    low, high = np.uint32(cell), np.uint32(cell >> _HALF)
    word = philox(low, high, np.uint32(0), np.uint32(3), key[0], key[1])[0]
    return thresholds[0] + ((np.uint64(word) * thresholds[3]) >> _HALF)


@compiled
def mask_cells(
    packed: tuple[np.ndarray, np.ndarray],
    cells: tuple[np.ndarray, np.ndarray],
    rules: Rules,
    masked: np.ndarray,
    labels: np.ndarray,
) -> int:
    """Corrupt packed cells in place.

    Parameters
    ----------
    packed : (tokens, cu_lengths)
        int32 or int64 [T], changed; and int64 [n + 1], where cells begin and end.
    cells : (numbers, keys)
        int64 [n], the cells' global numbers; and uint32 [n, 2], `stream_key` of each one's epoch.
    rules : (thresholds, gene_tokens, is_gene, mask_token)
        uint64 [4], of `MaskSettings.thresholds`; int32 [G], what a random token is drawn from; bool [V], which tokens
        may be chosen; int.
    masked, labels : int32 or int64 [T]
        Receive the places in ``tokens`` that were chosen, ascending, and the tokens that stood there.

    Returns
    -------
    int
        How many were chosen.
    """
    (tokens, cu_lengths), (numbers, keys) = packed, cells
    thresholds, gene_tokens, is_gene, mask_token = rules
    longest = 0
    for i in range(len(numbers)):
        longest = max(longest, cu_lengths[i + 1] - cu_lengths[i])
    words, kinds = np.empty(longest + LANES, np.uint32), np.empty(longest + LANES, np.uint32)
    places, drawn = np.zeros(longest + LANES, np.int32), np.empty(longest + LANES, np.uint32)
    total = 0
    for i in range(len(numbers)):
        row, cell, key = tokens[cu_lengths[i] : cu_lengths[i + 1]], np.uint64(numbers[i]), keys[i]
        _draw_words(len(row), cell, key, words)
        n = _choose(row, words, _rate_of(cell, key, thresholds), is_gene, places)
        _draw_fates(n, cell, key, len(gene_tokens), places, kinds, drawn)
        chosen, label = masked[total : total + n], labels[total : total + n]
        for j in range(n):
            place = np.uint64(places[j])
            token = row[place]
            chosen[j], label[j] = cu_lengths[i] + places[j], token
            kind = np.uint64(kinds[j])
            other = gene_tokens[drawn[j]] if kind < thresholds[2] else token
            row[place] = mask_token if kind < thresholds[1] else other
        total += n
    return total
