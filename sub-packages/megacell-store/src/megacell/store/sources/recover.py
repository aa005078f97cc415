# SPDX-License-Identifier: Apache-2.0
"""Whole counts out of log1p-normalised values, proven by encoding them again.

Normalisation makes of a count c the value v = log1p(c · s) with one scale s a cell. Dividing expm1(v) by the cell's
smallest is not enough: where values were stored to three decimals it is off by up to 0.11 at a count of 259. So the
scale is kept as an interval that each value narrows, in ascending order, and a cell counts as recovered only
if one scale brings every one of its counts back to the stored value within the stored precision.
"""

from typing import Any

import numpy as np

from megacell.core.jit import compiled

Array = np.ndarray[Any, Any]
MOST_FACTORS = 20  # a cell's smallest count is looked for among 1 … this
_ULPS = 4.0  # log1p and the scaling before it, in the type of storage, lose this much at most
_DECIMALS = 6


def stored_precision(values: Array) -> float:
    """Return half a step of the decimals that values were rounded to, 0 where they were not rounded.

    Parameters
    ----------
    values : float [n]
        As they are stored.
    """
    exact = values.astype(np.float64)
    slack = _ulp(values)
    for decimals in range(1, _DECIMALS):
        steps = np.round(exact, decimals)
        if (np.abs(exact - steps) <= slack).all() and (slack < 10.0**-decimals / 20).all():
            return 0.5 * 10.0**-decimals
    return 0.0


def tolerances(values: Array, precision: float) -> Array:
    """Return how far each stored value may be from the encoded one: float64 [n]."""
    wanted: Array = precision + _ULPS * np.maximum(_ulp(values), 1e-12)
    return wanted


def _ulp(values: Array) -> Array:
    steps: Array = np.spacing(np.maximum(np.abs(values), values.dtype.type(1))).astype(np.float64)
    return steps


@compiled
def recover_rows(indptr: Any, values: Any, tolerance: Any) -> tuple[Any, int]:
    """Recover the counts of each row.

    Parameters
    ----------
    indptr : int64 [rows + 1]
        From 0.
    values : float64 [nnz]
        log1p of scaled counts, all above zero.
    tolerance : float64 [nnz]
        As `tolerances` gives it.

    Returns
    -------
    counts : float64 [nnz]
    row : int
        The first row without a proof, -1 if all have one.
    """
    counts = np.zeros(len(values), np.float64)
    for row in range(len(indptr) - 1):
        start, stop = indptr[row], indptr[row + 1]
        if start == stop:
            continue
        order = np.argsort(values[start:stop]) + start
        proven = False
        for factor in range(1, MOST_FACTORS + 1):
            if _recover(order, values, tolerance, factor, counts):
                proven = True
                break
        if not proven:
            return counts, row
    return counts, -1


@compiled
def _recover(order: Any, values: Any, tolerance: Any, factor: int, counts: Any) -> bool:
    """Try one row with `factor` as its smallest count; True if the counts are proven."""
    first = order[0]
    low = np.expm1(values[first] - tolerance[first]) / factor  # the scale lies between low and high
    high = np.expm1(values[first] + tolerance[first]) / factor
    if low <= 0:
        return False
    for k in order:
        least = np.expm1(values[k] - tolerance[k])
        most = np.expm1(values[k] + tolerance[k])
        smallest, largest = np.ceil(least / high), np.floor(most / low)
        if largest < smallest:
            return False
        if largest == smallest:  # one whole number fits: it narrows the scale
            counts[k] = smallest
            low, high = max(low, least / smallest), min(high, most / smallest)
            if high < low:
                return False
        else:
            counts[k] = -1.0
    scale = 0.5 * (low + high)
    for k in order:
        if counts[k] < 0:  # several fitted when it was met; the scale is narrower now
            least = np.expm1(values[k] - tolerance[k])
            most = np.expm1(values[k] + tolerance[k])
            if np.ceil(least / high) != np.floor(most / low):
                return False
            counts[k] = np.ceil(least / high)
        if np.abs(np.log1p(counts[k] * scale) - values[k]) > tolerance[k]:
            return False
    return True


def looks_scaled(indptr: Array, values: Array) -> bool:
    """True if most values are fractions, but in most rows whole multiples of the row's smallest.

    Parameters
    ----------
    indptr : int64 [rows + 1]
        From 0.
    values : float64 [nnz]
        All above zero.
    """
    if (np.abs(values - np.round(values)) < 1e-6).mean() > 0.5:  # alevin's halves and thirds stand among whole counts
        return False
    filled = np.flatnonzero(np.diff(indptr))
    lengths, starts = np.diff(indptr)[filled], indptr[filled]
    ratio = values / np.repeat(np.minimum.reduceat(values, starts), lengths)
    small = ratio < 10  # beyond that, what rounding to three decimals does exceeds the tolerance
    off = np.where(small, np.abs(ratio - np.round(ratio)), 0.0)
    several = np.maximum.reduceat(np.where(small, ratio, 1.0), starts) > 1.5
    multiples = np.maximum.reduceat(off, starts) < 0.02
    informative = several & (lengths >= 10)
    return bool(informative.sum() >= 5 and multiples[informative].mean() > 0.9)
