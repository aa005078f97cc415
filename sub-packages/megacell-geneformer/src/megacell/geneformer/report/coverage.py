# SPDX-License-Identifier: Apache-2.0
"""How much of a vocabulary a store's files measure, as charts."""

from typing import Any

import numpy as np

from megacell.core.report.charts import bars
from megacell.core.report.page import Page
from megacell.geneformer.vocabulary.vocabulary import Vocabulary
from megacell.store import CellStore

MOST_SOURCES = 30


def measured(store: CellStore, vocabulary: Vocabulary) -> dict[str, float]:
    """Return the share of the vocabulary's genes that each source measures, and "all together"."""
    tokens = vocabulary.tokens_of(store.gene_ids, store.symbols)
    whole = len(vocabulary.gene_ids)

    def share(genes: Any) -> float:
        known = np.unique(tokens[genes])
        return float((known >= 0).sum()) / whole

    found = {"all together": share(slice(None))}
    return found | {source.name: share(store.panel(number)) for number, source in enumerate(store.sources)}


def coverage_section(page: Page, store: CellStore, vocabularies: list[Vocabulary]) -> None:
    """Add, for each vocabulary, a chart of the share of its genes that each source measures."""
    page.section("Coverage by vocabulary")
    drawn = {}
    for vocabulary in vocabularies:
        found = measured(store, vocabulary)
        title = f"{vocabulary.name}, {len(vocabulary.gene_ids):,} genes: share that is measured"
        if len(found) > MOST_SOURCES:  # the lowest are those to look at
            lowest = sorted(found.items(), key=lambda item: item[1])[: MOST_SOURCES - 1]
            title, found = (
                f"{title} (the lowest of {len(found) - 1:,} sources)",
                {"all together": found["all together"], **dict(lowest)},
            )
        drawn[title] = bars(title, found, lambda value: f"{value:.1%}", most=1.0)
    page.figures(drawn)
    page.text("A gene of the vocabulary that a file does not measure never stands in that file's cells.", note=True)
