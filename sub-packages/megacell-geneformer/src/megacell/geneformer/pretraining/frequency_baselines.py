# SPDX-License-Identifier: Apache-2.0
"""The baselines beside a run's loss: how frequent genes are, over all ranks and at each."""

from pathlib import Path

import numpy as np

from megacell.geneformer.baselines.frequency import TokenFrequency
from megacell.geneformer.pretraining.data import TrainingData
from megacell.geneformer.tokens.packing import gene_tokens, masked_ranks


def fit_frequencies(data: TrainingData, most: int) -> TokenFrequency:
    """Fit the two frequency baselines on at most ``most`` training cells, in the order of the first epoch."""
    frequency = TokenFrequency(data.vocabulary.size, data.vocabulary.gene_tokens)
    stream = data.stream()
    steps = max(1, min(len(data.train), most) // data.cfg.batch.cells)
    for step in range(steps):
        for batch in stream.step(step):
            frequency.add(*gene_tokens(batch, data.vocabulary))
    return frequency


def frequency_losses(frequency: TokenFrequency, data: TrainingData) -> dict[str, float]:
    """Return both baselines' loss in nats on the held-out cells' masked genes, and their number."""
    stream = data.stream(held_out=True)
    plain, ranked = [], []
    for step in range(stream.steps_per_epoch):
        for batch in stream.step(step):
            plain.append(frequency.frequency_nats(batch.labels))
            ranked.append(frequency.rank_frequency_nats(batch.labels, *masked_ranks(batch, data.vocabulary)))
    return {
        "frequency": float(np.concatenate(plain).mean()),
        "rank_frequency": float(np.concatenate(ranked).mean()),
        "masked_genes": int(sum(map(len, plain))),
    }


def save_frequencies(frequency: TokenFrequency, path: Path) -> None:
    """Keep the fitted tables in the run folder."""
    np.savez_compressed(path, allow_pickle=False, **frequency.to_arrays())
