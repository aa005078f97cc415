# SPDX-License-Identifier: Apache-2.0
"""What a matrix holds: counts, and of which kind, or values that only look like counts."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from megacell.store.sources.recover import looks_scaled

Array = np.ndarray[Any, Any]
UMI, FRACTIONAL, LENGTH_NORMALISED = "umi", "fractional", "length-normalised"
FEWEST_CELLS = 20  # fewer cells say nothing about the spread of totals
# Spread of totals = interquartile range / median. Real PBMC: 0.46 to 0.60. CP10k rounded to whole numbers: 0.04 to
# 0.06; totals scaled to their median and rounded: 0.09; such values of a third of the genes: up to 0.12.
LEAST_SPREAD = 0.15
# In real counts nearly every cell has a gene that was seen once (all PBMC here: 100 %); CP10k rounded: 9 to 37 %.
LEAST_WITH_ONES, ENOUGH_GENES = 0.75, 50
LARGEST_LOG = 16.0  # log1p of counts per million stays under 13.9


@dataclass(frozen=True)
class Verdict:
    """What a sample of a matrix shows.

    Attributes
    ----------
    kind : str
        "umi", "fractional" or "length-normalised"; "" if the values are no counts.
    reason : str
        Why not, in words that follow the name of the place.
    """

    kind: str
    reason: str = ""

    @property
    def is_counts(self) -> bool:
        """True for the kinds that need no permission."""
        return self.kind in (UMI, FRACTIONAL)


def judge(indptr: Array, values: Array) -> Verdict:
    """Tell counts from what normalisation made of them.

    Whole numbers alone prove nothing (rounded CP10k passes), so totals and smallest values are looked at too.

    Parameters
    ----------
    indptr : int64 [rows + 1]
        From 0.
    values : float [nnz]
        Of genes only; canonical rows.
    """
    if not len(values):
        return Verdict("", "has no values above zero")
    if not np.isfinite(values).all():
        return Verdict("", "has NaN or infinite values")
    if (values < 0).any():
        return Verdict("", "has negative values: scaled or residual expression")
    filled = np.flatnonzero(np.diff(indptr))
    starts = indptr[filled]
    values = values.astype(np.float64)
    totals = np.add.reduceat(values, starts)
    whole = bool((values == np.floor(values)).all())
    if whole:
        smallest, lengths = np.minimum.reduceat(values, starts), np.diff(indptr)[filled]
        return _judge_whole(smallest, lengths, totals, several=bool(values.max() > 1))
    return _judge_fractions(indptr, starts, values, totals)


def _judge_fractions(indptr: Array, starts: Array, values: Array, totals: Array) -> Verdict:
    largest = values.max()
    if largest < LARGEST_LOG:
        back = np.expm1(values)
        if looks_scaled(indptr, back) or _near_constant(np.add.reduceat(back, starts)):
            return Verdict("", "has log-normalised values")
    if looks_scaled(indptr, values):
        return Verdict("", "has normalised values: in each cell they are whole multiples of the smallest")
    if _near_constant(totals):
        if abs(np.median(totals) / 1e6 - 1) < 0.01:
            return Verdict(LENGTH_NORMALISED, "has totals of a million: TPM")
        return Verdict("", f"has near-constant totals (about {np.median(totals):,.0f}): normalised values")
    if largest < LARGEST_LOG and len(starts) >= FEWEST_CELLS:
        return Verdict("", f"has fractions and no value over {largest:.1f}: logarithms, it seems")
    return Verdict(FRACTIONAL)


def _judge_whole(smallest: Array, lengths: Array, totals: Array, *, several: bool) -> Verdict:
    if _near_constant(totals):
        return Verdict("", f"has near-constant totals (about {np.median(totals):,.0f}): rounded normalised values")
    if not several and len(lengths) >= FEWEST_CELLS:
        return Verdict("", "has no count above one: presence and absence")
    enough = lengths >= ENOUGH_GENES
    if enough.sum() >= FEWEST_CELLS and (smallest[enough] == 1).mean() < LEAST_WITH_ONES:
        return Verdict("", "has whole numbers, but most cells lack the count 1: rounded normalised values")
    return Verdict(UMI)


def _near_constant(totals: Array) -> bool:
    if len(totals) < FEWEST_CELLS:
        return False
    low, middle, high = np.percentile(totals, [25, 50, 75])
    return bool(high - low < LEAST_SPREAD * middle)
