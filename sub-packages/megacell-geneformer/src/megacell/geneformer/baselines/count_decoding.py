# SPDX-License-Identifier: Apache-2.0
"""The counts behind a cell's ranking, decoded by Viterbi; the objective is described in `count_arithmetic`."""

import math

import numpy as np

from megacell.core.jit import compiled

MAX_RANDOM_RUN = 3  # random genes in a row; they are 1 in 59 of the visible tokens


@compiled
def decode_counts(tokens, place, log_count, random_cost, violation_cost):
    """The most likely counts of a cell's visible tokens, by Viterbi over (token, count); exact for the objective.

    Parameters
    ----------
    tokens : int array [n]
        Visible gene tokens by rank.
    place : int32 [size, K]
        Place of (gene, count) in the order of all pairs; falls as the count grows.
    log_count : float64 [size, K]
        log P(count | gene).
    random_cost, violation_cost : float
        Nats for taking a token as random, and for an honest token whose place does not rise.

    Returns
    -------
    int64 [n]
        Counts in 1..K (K for K and above); 0 for a token taken as random.
    """
    n, n_counts = len(tokens), place.shape[1]
    score = np.empty((n, n_counts))  # best sum of a path whose last honest token is t, with that count
    back_step = np.zeros((n, n_counts), dtype=np.int8)  # tokens back to the honest one before; 0: there is none
    back_count = np.zeros((n, n_counts), dtype=np.int8)
    peak = np.zeros(n, dtype=np.int64)  # each token's count of highest score
    for t in range(n):
        all_random = t * random_cost if t > 0 else 0.0  # not 0 * infinity
        score[t] = -all_random if t <= MAX_RANDOM_RUN else -math.inf
        for step in range(1, min(t, MAX_RANDOM_RUN + 1) + 1):
            s = t - step
            penalty = (step - 1) * random_cost if step > 1 else 0.0
            fallen = score[s, peak[s]] - violation_cost
            rising, rising_count, j = -math.inf, -1, n_counts - 1
            for c in range(n_counts - 1, -1, -1):  # places rise as counts fall: s's admissible counts grow with them
                while j >= 0 and place[tokens[s], j] < place[tokens[t], c]:
                    if score[s, j] > rising:
                        rising, rising_count = score[s, j], j
                    j -= 1
                best, count = (rising, rising_count) if rising >= fallen else (fallen, peak[s])
                if best - penalty > score[t, c]:
                    score[t, c], back_step[t, c], back_count[t, c] = best - penalty, step, count
        score[t] += log_count[tokens[t]]
        peak[t] = np.argmax(score[t])
    counts = np.zeros(n, dtype=np.int64)
    if n == 0:
        return counts
    t, best = n - 1, score[n - 1, peak[n - 1]]
    for skipped in range(1, min(n - 1, MAX_RANDOM_RUN) + 1):
        s = n - 1 - skipped
        if score[s, peak[s]] - skipped * random_cost > best:
            t, best = s, score[s, peak[s]] - skipped * random_cost
    c = peak[t]
    while True:
        counts[t] = c + 1
        step = back_step[t, c]
        if step == 0:
            return counts
        t, c = t - step, back_count[t, c]
