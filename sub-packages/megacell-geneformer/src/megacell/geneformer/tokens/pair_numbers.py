# SPDX-License-Identifier: Apache-2.0
"""Where pairs of a gene and a small count stand among all such pairs: a cell can be ranked by looking its pairs up.

Within a cell, values (count / total x 10,000 / median) stand in the order of count / median, whatever the total, but
for rounding. Let u = 2^-53. A ratio as computed lies within u of the true one, a value as computed within 3 u of its
own (three operations), both relatively. So where two ratios differ by 16 u or more, the values of any cell stand in
their order, strictly. All pairs are put in the order of their ratios here, once, and numbered:

- pairs whose ratios differ by less than `NEAR` (64 u) from one to the next share a number: their values decide in the
  cell. But pairs of one count and one median have one value in every cell, so these have numbers by ascending token;
- even numbers are free. A pair that has no number takes the one between its neighbours, or that of a pair within half
  of `NEAR`: closer to it than to any pair of another number.

Smaller numbers rank first. Counts are whole; each gene has numbers for as many as are likely, which follows its median.
"""

from typing import Any, NamedTuple

import numpy as np

PLACE_BITS = 13  # of a key: place of a count in its row; above them the number of its pair
DAMAGED = (1 << 19) - 1
UNKNOWN = (1 << 19) - 2
OTHER = (1 << 19) - 3
MOST_PAIRS = (1 << 18) - 4
MOST_OTHERS = 32  # pairs of a row without a number: more are slower than the values of the whole row
NEAR = 2.0**-47
LEAST_COUNTS, MOST_COUNTS = 3, 253  # of a gene
FIRST_DAMAGED = 1 << 16
LEAST_MEDIAN, MOST_MEDIAN = 1e-100, 1e100  # far from where values stop being relatively exact


class PairNumbers(NamedTuple):
    """Numbers of pairs (G genes, P numbers that are given), as compiled loops look them up.

    Attributes
    ----------
    by_gene : uint32 [at least 2^16]
        Where a gene's keys begin in ``keys``, times 256, plus the count from which on there is `OTHER`.
    keys : uint32
        The number, times 2^PLACE_BITS, of each gene's counts from 0 on: `UNKNOWN` for no count and no token, `OTHER`
        for pairs without a number, `DAMAGED` for genes that do not exist.
    lowest, highest : float64 [P]
        Ratios of the pairs of number 2 i + 1.
    most_others : int
        Pairs without a number that a row may have.
    """

    by_gene: Any
    keys: Any
    lowest: Any
    highest: Any
    most_others: int


def number_pairs(tokens: np.ndarray, medians: np.ndarray, shared: np.ndarray) -> PairNumbers:
    """Number the pairs of genes and counts.

    Parameters
    ----------
    tokens : int32 [G]
        Of each gene, -1 for none.
    medians : float64 [G]
        Of each gene's token.
    shared : bool [G]
        Genes whose counts are added up with others' first: they get no numbers.
    """
    alone = np.flatnonzero((tokens >= 0) & ~shared)
    alone = alone[np.argsort(tokens[alone], kind="stable")]
    exact = not len(alone) or LEAST_MEDIAN < medians[alone].min() <= medians[alone].max() < MOST_MEDIAN
    counts_of = _counts_of(medians[alone] if exact else np.ones(0))
    alone = alone[: len(counts_of)]
    gene = np.repeat(alone, counts_of)
    count = np.arange(len(gene)) - np.repeat(np.cumsum(counts_of) - counts_of, counts_of) + 1.0
    number, lowest, highest = _numbered(count, medians[gene])

    length = np.where(tokens >= 0, 2, 0)  # none, and too many
    length[alone] += counts_of
    first = 2 + np.cumsum(length) - length
    keys = np.full(2 + length.sum(), UNKNOWN, np.uint32)
    keys[1] = DAMAGED
    known = tokens >= 0
    keys[(first + length - 1)[known]] = OTHER
    keys[first[gene] + count.astype(np.int64)] = number
    by_gene = np.full(max(FIRST_DAMAGED, len(tokens)), 1 << 8, np.uint32)
    by_gene[: len(tokens)] = np.where(known, first << 8 | np.maximum(length - 1, 0), 0)
    return PairNumbers(by_gene, keys << np.uint32(PLACE_BITS), lowest, highest, MOST_OTHERS if exact else 0)


def _counts_of(medians: np.ndarray) -> np.ndarray:
    """Return how many counts of each gene get a number: a multiple of its median, such that all numbers are used."""
    if not len(medians):
        return np.zeros(0, np.int64)
    least = min(LEAST_COUNTS, MOST_PAIRS // len(medians))
    reach, low = MOST_COUNTS / medians.min(), 0.0
    while reach - low > 1e-3 * reach:  # the greatest reach that fits, by halving
        middle = 0.5 * (low + reach)
        fits = np.clip(np.ceil(middle * medians), least, MOST_COUNTS).sum() <= MOST_PAIRS
        low, reach = (middle, reach) if fits else (low, middle)
    return np.clip(np.ceil(low * medians), least, MOST_COUNTS).astype(np.int64)


def _numbered(count: np.ndarray, median: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the number of each pair (given by ascending token), and lowest and highest ratio by number."""
    order = np.argsort(-(count / median), kind="stable")
    count, median = count[order], median[order]
    ratio = count / median
    near = ratio[:-1] - ratio[1:] <= NEAR * ratio[1:]
    alike = (count[:-1] == count[1:]) & (median[:-1] == median[1:])
    begins = np.concatenate([np.ones(min(1, len(ratio)), bool), ~near])
    group = np.cumsum(begins) - 1
    mixed = np.zeros(len(ratio) and group[-1] + 1, bool)
    mixed[group[1:][near & ~alike]] = True
    begins |= ~mixed[group]
    place = np.cumsum(begins) - 1
    ends = np.concatenate([begins[1:], np.ones(min(1, len(ratio)), bool)])
    number = np.empty(len(ratio), np.uint32)
    number[order] = 2 * place + 1
    return number, ratio[ends], ratio[begins]
