# SPDX-License-Identifier: Apache-2.0
"""What a run trains on and is validated with: store, vocabulary, split, cells, and the baselines beside its loss."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from omegaconf import DictConfig

from megacell.geneformer.baselines import TokenFrequency
from megacell.geneformer.batches import BatchStream, MicroBatch
from megacell.geneformer.lengths import token_lengths
from megacell.geneformer.masking import MaskSettings
from megacell.geneformer.split import Split, SplitSettings, split_cells
from megacell.geneformer.token_folder import open_cells
from megacell.geneformer.vocabulary import Vocabulary, check_coverage
from megacell.store import CellStore
from megacell.store.errors import DataError

PACK_MULTIPLE = 64  # a pack's length is a multiple of it times the tensor parallel size


def split_settings(vocabulary: Vocabulary, **given) -> SplitSettings:
    """Return what was ``given`` (None: not), else as the vocabulary was built, else the defaults."""
    built = vocabulary.split or {}
    return SplitSettings(**{**built, **{k: v for k, v in given.items() if v is not None}})


def some_of(cells: np.ndarray, most: int, seed: int) -> np.ndarray:
    """Return at most ``most`` of the cells, drawn by ``seed`` from all of them, in their order."""
    if len(cells) <= most:
        return cells
    return np.sort(np.random.default_rng(seed).choice(cells, most, replace=False))


@dataclass
class TrainingData:
    """The data of one run, the same on every rank.

    Attributes
    ----------
    train, validation : int64 [cells]
        Global cell numbers; cells without a known gene are left out.
    lines : list of str
        What a user should know: coverage, split, cells left out.
    """

    store: CellStore
    vocabulary: Vocabulary
    split: Split
    settings: SplitSettings
    lengths: np.ndarray
    train: np.ndarray
    validation: np.ndarray
    lines: list[str]
    cfg: DictConfig
    max_length: int

    @classmethod
    def open(cls, cfg: DictConfig) -> "TrainingData":
        """Open everything; raises DataError where store and vocabulary do not fit or no cell is left."""
        vocabulary = Vocabulary.open(cfg.vocabulary)
        store = open_cells(cfg.store, vocabulary)
        coverage = check_coverage(
            store.gene_ids, store.symbols, vocabulary, str(cfg.store), allow=cfg.data.allow_low_coverage
        )
        settings = split_settings(vocabulary, **cfg.data.split)
        split = split_cells(store, settings)
        lengths = token_lengths(store, vocabulary)
        known = lengths > 0
        train, validation = (np.flatnonzero(side & known) for side in (split.train, split.validation))
        lines = [
            f"store: {len(store):,} cells, generation {store.generation}; measures {coverage:.0%} of the vocabulary",
            split.line,
        ]
        if vocabulary.split and settings != SplitSettings(**vocabulary.split):
            lines.append("warning: the vocabulary was built on another split; its medians have seen held-out cells")
        if skipped := int(len(store) - known.sum()):
            lines.append(f"{skipped:,} cells have no gene of the vocabulary and are skipped")
        if not len(train) or not len(validation):
            raise DataError(
                f"{cfg.store}: no cells left to train on or to hold out; change data.split or the vocabulary"
            )
        validation = some_of(validation, cfg.validation.cells, settings.seed)
        return cls(store, vocabulary, split, settings, lengths, train, validation, lines, cfg, cfg.model.max_length)

    def stream(self, *, held_out: bool = False, rank: int = 0, ranks: int = 1, tensor: int = 1) -> BatchStream:
        """Return the steps of data parallel rank ``rank`` of ``ranks``."""
        return BatchStream(
            self.store,
            self.vocabulary,
            self.validation if held_out else self.train,
            self.lengths,
            max_length=self.max_length,
            global_batch=max(self.cfg.batch.cells, ranks) if held_out else self.cfg.batch.cells,
            token_budget=self.cfg.batch.tokens,
            multiple_of=PACK_MULTIPLE * tensor,
            seed=self.cfg.seed,
            rank=rank,
            ranks=ranks,
            masking=MaskSettings(**self.cfg.data.masking),
            validation=held_out,
        )


def gene_tokens(batch: MicroBatch, vocabulary: Vocabulary) -> tuple[np.ndarray, np.ndarray]:
    """Return a micro-batch's true gene tokens without specials (int32 flat), and where each cell starts (int64)."""
    tokens = batch.tokens.copy()
    tokens[batch.masked] = batch.labels
    starts = batch.cu_seqlens[: len(batch.cells) + 1].astype(np.int64)
    inside = np.zeros(len(tokens), bool)
    inside[: starts[-1]] = True
    for k in range(len(vocabulary.prefix)):
        inside[starts[:-1] + k] = False
    for k in range(len(vocabulary.suffix)):
        inside[starts[1:] - 1 - k] = False
    lengths = np.diff(starts) - len(vocabulary.prefix) - len(vocabulary.suffix)
    return tokens[inside].astype(np.int32), np.concatenate([[0], np.cumsum(lengths)])


def masked_ranks(batch: MicroBatch, vocabulary: Vocabulary) -> tuple[np.ndarray, np.ndarray]:
    """Return, for each masked position, its rank among its cell's genes and the cell's number of genes (int64)."""
    starts = batch.cu_seqlens[: len(batch.cells) + 1].astype(np.int64)
    genes = np.diff(starts) - len(vocabulary.prefix) - len(vocabulary.suffix)
    cell = np.searchsorted(starts, batch.masked, side="right") - 1
    return batch.masked - starts[cell] - len(vocabulary.prefix), genes[cell]


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
