# SPDX-License-Identifier: Apache-2.0
"""Count arithmetic: how far the masked-gene task can be solved with no network, from what rank order gives away.

Rank value encoding orders a cell's genes by ``count / median``. Counts are small whole numbers and each gene stands
once, so the genes visible around a masked one say between which two values it lies, and few unseen genes have a whole
count there. Beside this baseline one sees which part of a network's loss is more than arithmetic on the order; no
biological claim should rest on the rest alone.

The model
---------
Fitted on training cells: each gene's detection rate ``d = (cells that show it + 0.5) / (cells + 1)``; its table of
counts ``P(c | gene)`` for c = 1..60, proportional to (cells with that count + 0.3 / c²), counts above 60 sharing the
last bin; rank frequency (`megacell.geneformer.baselines`). Given, not fitted: the vocabulary's medians. All (gene,
count) pairs have one order over the whole vocabulary, by descending ``count / median`` and then ascending token, as
the rank encoding has; a pair's number in that order is its *place*, and an undisturbed cell has places that rise
along its ranking. The cell total cancels.

1. Decoding (`megacell.geneformer.count_decoding`). The visible tokens' counts are the Viterbi path that maximises,
   over the tokens taken as honest, the sum of ``log P(c | gene)``, less ``random_cost`` for each token taken as a
   random gene (at most three in a row), less ``violation_cost`` wherever an honest token's place does not rise above
   that of the honest token before it, as may happen with counts above 60.
2. Prediction. A chosen position lies between its nearest honest visible neighbours. Each unseen gene with a count
   whose place is between theirs weighs ``w P(c | gene)``, where ``w = d / (1 - (1 - hidden_share) d)`` is, up to a
   factor, the chance that a gene that is not seen is hidden and not absent: a gene that nearly every cell shows is,
   when not seen, most likely masked.
3. Fallback. ``fallback_share`` of the probability, or all where nothing fits, goes to 0.9 rank frequency among unseen
   genes plus 0.1 plain rank frequency, so that no gene has probability zero. Unseen means: not among the visible
   tokens.

Convention: as the loss is taken at chosen positions, the model is told which positions were chosen. Of those that do
not show ``<mask>`` it is not told which are random and which are kept, the halves being equally many: it gives 0.5 to
the token shown and 0.5 to the prediction above, made from its neighbours. A network is not told that an unmasked
position was chosen.

What it leaves out: the decoded counts are taken as certain; masked positions of one gap are predicted one by one;
counts do not depend on the cell's type or depth. Arithmetic can do better than this.

The constants were settled once on two sets of PBMC, and are not fitted for a run. ``random_cost`` infinite,
``violation_cost`` 6, ``hidden_share`` 1 and ``fallback_share`` 0.1 give the plainer model that knows neither of random
genes nor that a common gene, when not seen, is likely masked.
"""

import math
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from megacell.core.errors import DataError
from megacell.core.jit import compiled
from megacell.geneformer.baselines.count_decoding import decode_counts
from megacell.geneformer.baselines.frequency import RANK_BINS, TokenFrequency

COUNT_PRIOR = 0.3  # P(c | gene) is smoothed by this / c²
TIE = 1e-9  # values closer than this, relatively, are one value: the tokens order them


@dataclass(frozen=True)
class ArithmeticSettings:
    """The model's constants; see the module's text for what each does.

    Attributes
    ----------
    max_count : int
        Counts above it share its bin; at most 127.
    random_cost : float
        Nats for taking a visible token as a random gene; infinity forbids it.
    violation_cost : float
        Nats for an honest token whose value rises.
    hidden_share : float
        Share of a cell's genes that show ``<mask>``: 0.15 chosen times 0.8. At 1 a gene that is not seen weighs its
        detection rate.
    fallback_share : float
        Probability kept for rank frequency.
    """

    max_count: int = 60
    random_cost: float = 6.0
    violation_cost: float = 12.0
    hidden_share: float = 0.12
    fallback_share: float = 0.05


@dataclass(frozen=True)
class _Fitted:
    """The tables that the compiled code reads; places run over all (gene, count) pairs.

    place int32 [size, K]; log_count float64 [size, K]; by place: pair_gene int32 [pairs], pair_weight float64 [pairs];
    rank_frequency float64 [25, size].
    """

    place: np.ndarray
    log_count: np.ndarray
    pair_gene: np.ndarray
    pair_weight: np.ndarray
    rank_frequency: np.ndarray


class CountArithmetic:
    """The masked-gene task by arithmetic on counts: `add` training cells, `fit` with medians, `nats` of held-out cells.

    Parameters
    ----------
    size : int
        Vocabulary size: the largest token + 1.
    gene_tokens : int array [G]
        All tokens that are genes, ascending.
    settings : ArithmeticSettings
        The model's constants.
    """

    def __init__(
        self, size: int, gene_tokens: npt.ArrayLike, settings: ArithmeticSettings = ArithmeticSettings()
    ) -> None:
        if not 1 <= settings.max_count <= 127:
            raise ValueError(f"max_count is {settings.max_count}: it must lie in 1..127")
        if not math.isfinite(settings.violation_cost):
            raise ValueError("violation_cost must be finite: without violations some cells have no counts that fit")
        self.settings = settings
        self.frequency = TokenFrequency(size, gene_tokens)
        self.count_table = np.zeros((size, settings.max_count), dtype=np.int64)
        self._fitted: _Fitted | None = None

    def add(self, tokens: np.ndarray, counts: np.ndarray, cu_lengths: np.ndarray) -> None:
        """Count training cells.

        Parameters
        ----------
        tokens : int32 [T]
            Gene tokens of the cells one after the other, each cell by descending value, without specials.
        counts : float64 [T]
            Raw counts of those tokens.
        cu_lengths : int64 [cells + 1]
            Cell i holds ``tokens[cu_lengths[i]:cu_lengths[i + 1]]``.

        Raises
        ------
        DataError
            A count is not a whole number of at least 1.
        ValueError
            A token is not a gene, or the lengths do not agree.
        """
        tokens, counts = np.asarray(tokens), np.asarray(counts, dtype=np.float64)
        if tokens.shape != counts.shape:
            raise ValueError(f"{tokens.shape} tokens have {counts.shape} counts")
        odd = counts[~((counts >= 1) & (counts == np.floor(counts)) & np.isfinite(counts))]
        if odd.size:
            raise DataError(
                f"count arithmetic needs whole counts of at least 1, but the training cells hold {odd[0]:g}: "
                "fit it on cells from sources with whole counts, or leave this baseline out"
            )
        self.frequency.add(tokens, cu_lengths)
        bins = np.minimum(counts, self.settings.max_count).astype(np.int64) - 1
        np.add.at(self.count_table, (tokens, bins), 1)
        self._fitted = None

    def fit(self, medians_by_token: np.ndarray) -> None:
        """Make the tables from the cells added so far; to be called again after more are added.

        Parameters
        ----------
        medians_by_token : float64 [size]
            The vocabulary's median of each gene, at its token; what stands at specials is not read.

        Raises
        ------
        DataError
            A gene's median is not a positive number.
        """
        frequency, settings = self.frequency, self.settings
        genes = frequency.gene_tokens
        medians = np.asarray(medians_by_token, dtype=np.float64)
        if medians.shape != (frequency.size,):
            raise ValueError(f"medians have shape {medians.shape}: one is needed for each of {frequency.size} tokens")
        bad = genes[~((medians[genes] > 0) & np.isfinite(medians[genes]))]
        if bad.size:
            raise DataError(
                f"the vocabulary's median of token {bad[0]} is {medians[bad[0]]:g}, not a positive number: "
                "build or import the vocabulary again"
            )
        smoothed = self.count_table + COUNT_PRIOR / np.arange(1, settings.max_count + 1) ** 2
        of_gene = smoothed / smoothed.sum(axis=1, keepdims=True)
        detection = (frequency.token_counts + 0.5) / (frequency.cells + 1)
        unseen_weight = detection / (1 - (1 - settings.hidden_share) * detection)
        gene, count = _pairs_in_order(genes, medians, settings.max_count)
        place = np.full(self.count_table.shape, -1, dtype=np.int32)
        place[gene, count - 1] = np.arange(len(gene), dtype=np.int32)
        self._fitted = _Fitted(
            place=place,
            log_count=np.log(of_gene),
            pair_gene=gene,
            pair_weight=unseen_weight[gene] * of_gene[gene, count - 1],
            rank_frequency=frequency.probabilities()[1],
        )

    def nats(
        self,
        shown_tokens: np.ndarray,
        true_tokens: np.ndarray,
        chosen: np.ndarray,
        masked: np.ndarray,
        cu_lengths: np.ndarray,
    ) -> np.ndarray:
        """Loss at the chosen positions of held-out cells.

        Parameters
        ----------
        shown_tokens : int32 [T]
            Gene tokens as the network is shown them, random genes in place; not read where `masked` is true.
        true_tokens : int32 [T]
            The genes that truly stand there.
        chosen : bool [T]
            Positions at which the loss is taken.
        masked : bool [T]
            Positions that show ``<mask>``, all of them chosen.
        cu_lengths : int64 [cells + 1]
            Offsets of the cells.

        Returns
        -------
        float64 [number chosen]
            -log p(true token) in nats, in the order of the positions.

        Raises
        ------
        ValueError
            `fit` was not called after `add`, a token is not a gene, or the arrays do not agree.
        """
        if self._fitted is None:
            raise ValueError("call fit after the training cells were added")
        chosen, masked = np.asarray(chosen, dtype=bool), np.asarray(masked, dtype=bool)
        true_tokens, cu_lengths = np.asarray(true_tokens), np.asarray(cu_lengths, dtype=np.int64)
        if not len(shown_tokens) == len(true_tokens) == len(chosen) == len(masked) or np.any(masked & ~chosen):
            raise ValueError("shown, true, chosen and masked must be equally long, and masked positions chosen")
        shown = np.where(masked, true_tokens, shown_tokens)  # a gene token throughout; masked ones are never looked at
        self.frequency.check(true_tokens, cu_lengths)
        self.frequency.check(shown)
        nats = np.empty(np.count_nonzero(chosen))
        first_chosen = np.cumsum(chosen, dtype=np.int64) - chosen
        for start, end in pairwise(cu_lengths[np.append(True, np.diff(cu_lengths) > 0)]):  # but for empty cells
            cell, first = slice(start, end), first_chosen[start]
            cell_nats = self._cell_nats(shown[cell], true_tokens[cell], chosen[cell], masked[cell])
            nats[first : first + len(cell_nats)] = cell_nats
        return nats

    def _cell_nats(self, shown: np.ndarray, true: np.ndarray, chosen: np.ndarray, masked: np.ndarray) -> np.ndarray:
        """-log p(true token) at one cell's chosen positions, float64 [number chosen]."""
        fitted, settings = self._fitted, self.settings
        assert fitted is not None
        visible = shown[~masked]
        counts = decode_counts(visible, fitted.place, fitted.log_count, settings.random_cost, settings.violation_cost)
        places = np.where(counts > 0, fitted.place[visible, counts - 1], -1)
        unseen = self.frequency.is_gene.copy()
        unseen[visible] = False
        at = np.flatnonzero(chosen)
        before = np.cumsum(~masked) - ~masked  # visible tokens before each position
        fits = np.empty(len(at))
        _window_shares(before[at], masked[at], true[at], places, unseen, fitted.pair_gene, fitted.pair_weight, fits)
        rank_bin = at * RANK_BINS // len(shown)
        plain = fitted.rank_frequency[rank_bin, true[at]]
        unseen_mass = (fitted.rank_frequency @ unseen)[rank_bin]
        fallback = np.where(unseen_mass > 0, 0.9 * unseen[true[at]] * plain / unseen_mass + 0.1 * plain, plain)
        share = settings.fallback_share
        p = np.where(np.isnan(fits), fallback, (1 - share) * fits + share * fallback)
        nats: np.ndarray = -np.log(np.where(masked[at], p, 0.5 * p + 0.5 * (shown[at] == true[at])))
        return nats


def _pairs_in_order(genes: np.ndarray, medians: np.ndarray, max_count: int) -> tuple[np.ndarray, np.ndarray]:
    """All (gene, count) pairs by descending count / median, ties by ascending token: int32, int64 [pairs]."""
    gene = np.repeat(genes, max_count)
    count = np.tile(np.arange(1, max_count + 1), len(genes))
    value = np.log(count) - np.log(medians[gene])
    order = np.argsort(-value, kind="stable")
    level = np.cumsum(np.diff(value[order], prepend=value[order[0]]) < -TIE)
    order = order[np.lexsort((gene[order], level))]
    return gene[order], count[order]


@compiled
def _window_shares(before, masked, true, places, unseen, pair_gene, pair_weight, shares):
    """Share of the true gene among the unseen genes that fit between a position's honest neighbours; NaN if none does.

    before int64 [M]: visible tokens before the position; masked bool [M]; true int [M]; places int [visible], -1 for
    random; unseen bool [size]; shares float64 [M] is filled.
    """
    for m in range(len(before)):
        left, right = before[m] - 1, before[m] + (0 if masked[m] else 1)  # its own shown token tells nothing
        while left >= 0 and places[left] < 0:
            left -= 1
        while right < len(places) and places[right] < 0:
            right += 1
        start = places[left] if left >= 0 else -1
        end = places[right] if right < len(places) else len(pair_gene)
        if start > end:
            start, end = end, start
        total, fitting = 0.0, 0.0
        for pair in range(start + 1, end):
            if unseen[pair_gene[pair]]:
                total += pair_weight[pair]
                if pair_gene[pair] == true[m]:
                    fitting += pair_weight[pair]
        shares[m] = fitting / total if total > 0 else math.nan
