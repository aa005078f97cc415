# SPDX-License-Identifier: Apache-2.0
"""What a run trains on and is validated with: store, vocabulary, split and cells."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import DictConfig, OmegaConf

from megacell.core.errors import DataError
from megacell.geneformer.tokens.lengths import token_lengths
from megacell.geneformer.tokens.masking import MaskSettings
from megacell.geneformer.tokens.packing import MicroBatch
from megacell.geneformer.tokens.stream import token_stream
from megacell.geneformer.tokens.token_dataset import TokenFolder, open_cells
from megacell.geneformer.vocabulary.vocabulary import Vocabulary, check_coverage
from megacell.store import CellStore
from megacell.store.sampling.batch_stream import BatchStream
from megacell.store.sampling.cell_set import CellSet, choose_cells
from megacell.store.sampling.order import BlockShuffled, Order, Shuffled, balanced, some_of
from megacell.store.sampling.split import SplitSettings, split_cells
from megacell.training.run.recorded import open_recorded

PACK_MULTIPLE = 64  # a pack's length is a multiple of it times the tensor parallel size


def split_settings(vocabulary: Vocabulary, **given) -> SplitSettings:
    """Return what was ``given`` (None: not), else as the vocabulary was built, else the defaults."""
    built = vocabulary.split or {}
    return SplitSettings(**{**built, **{k: v for k, v in given.items() if v is not None}})


def choice(options: DictConfig) -> dict[str, Any]:
    """Return the options that choose cells, as `cells_in_use` takes them."""
    return {"where": options.where, "exclude": OmegaConf.to_container(options.exclude) if options.exclude else None}


def cells_in_use(
    store: CellStore, lengths: np.ndarray, where: str | None = None, exclude: Mapping[str, Any] | None = None
) -> CellSet:
    """Return the cells that have a known gene and that the options ``data.where`` and ``data.exclude`` leave."""
    if where is None and not exclude:
        return CellSet.of(lengths > 0)
    return choose_cells(store, where, exclude).having(lengths)


def coverage_line(store: Any, vocabulary: Vocabulary, *, allow: bool) -> str:
    """Return how much of the vocabulary a store measures, in words; DataError if that is too little."""
    if isinstance(store, TokenFolder):
        return "tokens: how much of the vocabulary was measured is not known"
    coverage = check_coverage(store.gene_ids, store.symbols, vocabulary, str(store.path), allow=allow)
    return f"measures {coverage:.0%} of the vocabulary"


def order_of(options: DictConfig, store: CellStore, cells: CellSet) -> tuple[Order, list[str]]:
    """Return the order in which cells are trained on, and lines for the log."""
    if options.balance is not None:
        order, line = balanced(store, options.balance, cells)
        return order, [line]
    if options.order == "blocks":
        blocks = BlockShuffled(options.block, options.blocks)
        return blocks, [str(blocks)]
    return Shuffled(), []


@dataclass
class TrainingData:
    """The data of one run, the same on every rank.

    Attributes
    ----------
    train : CellSet
        What is trained on. Like ``validation`` without cells that have no known gene, and those left out by choice.
    validation : int64 [cells]
        Global cell numbers.
    order : Order
        In which cells are trained on.
    lines : list of str
        What a user should know: coverage, split, cells left out, how they are drawn.
    """

    store: CellStore
    vocabulary: Vocabulary
    settings: SplitSettings
    lengths: np.ndarray
    train: CellSet
    validation: np.ndarray
    order: Order
    lines: list[str]
    cfg: DictConfig
    max_length: int

    @classmethod
    def open(cls, cfg: DictConfig, record: Mapping[str, Any] | None = None) -> "TrainingData":
        """Open everything, at the generation of a checkpoint's record of the store where there is one.

        Raises
        ------
        UsageError, DataError
            Store, vocabulary, record and options do not fit each other, or no cell is left.
        """
        vocabulary, grown = Vocabulary.open(cfg.vocabulary), None

        def opened(path: str | Path, generation: int | None = None) -> Any:
            return open_cells(path, vocabulary, generation)

        if record is None:
            store = opened(cfg.store)
        else:
            store, grown = open_recorded(cfg.store, record, opened)
        measured = coverage_line(store, vocabulary, allow=cfg.data.allow_low_coverage)
        settings = split_settings(vocabulary, **cfg.data.split)
        split, lengths = split_cells(store, settings), token_lengths(store, vocabulary)
        used = cells_in_use(store, lengths, **choice(cfg.data))
        train, validation = (CellSet.of(side) & used for side in (split.train, split.validation))
        if not len(train) or not len(validation):
            raise DataError(
                f"{cfg.store}: {len(train):,} cells left to train on, {len(validation):,} held out ({split.line}); "
                "change data.where, data.exclude, data.split or the vocabulary"
            )
        order, drawn = order_of(cfg.data, store, train)
        lines = [f"store: {len(store):,} cells, generation {store.generation}; {measured}", split.line]
        lines += [grown] if grown else []
        if vocabulary.split and settings != SplitSettings(**vocabulary.split):
            lines.append("warning: the vocabulary was built on another split; its medians have seen held-out cells")
        if skipped := int(len(store) - (lengths > 0).sum()):
            lines.append(f"{skipped:,} cells have no gene of the vocabulary and are skipped")
        if any(choice(cfg.data).values()):
            lines.append(
                f"data.where and data.exclude leave {len(used):,} of {len(store):,} cells: {len(train):,} to train "
                f"on, {len(validation):,} held out"
            )
        some = some_of(validation[:], cfg.validation.cells, settings.seed)
        return cls(store, vocabulary, settings, lengths, train, some, order, lines + drawn, cfg, cfg.model.max_length)

    def stream(
        self, *, held_out: bool = False, rank: int = 0, ranks: int = 1, tensor: int = 1
    ) -> BatchStream[MicroBatch]:
        """Return the steps of data parallel rank ``rank`` of ``ranks``."""
        return token_stream(
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
            order=None if held_out else self.order,
            validation=held_out,
        )
