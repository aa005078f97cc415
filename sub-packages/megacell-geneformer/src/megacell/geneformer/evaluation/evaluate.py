# SPDX-License-Identifier: Apache-2.0
"""How well a model predicts masked genes of held-out cells, beside what needs no network: frequency, and arithmetic.

Cells of a store are held out as the model's own run did it. The baselines are fitted on the store's other cells and
meet exactly the masked genes that the model meets. Count arithmetic (``count_arithmetic``) uses that a ranking gives
most counts away; a model that does not beat it may have learned nothing about cells.
"""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from omegaconf import DictConfig, OmegaConf

from megacell.core.errors import DataError, UsageError
from megacell.geneformer.baselines.count_arithmetic import CountArithmetic
from megacell.geneformer.embedding.embedder import PACK_TOKENS
from megacell.geneformer.pretraining.data import cells_in_use, coverage_line
from megacell.geneformer.tokens.lengths import token_lengths
from megacell.geneformer.tokens.masking import MaskSettings
from megacell.geneformer.tokens.packing import MicroBatch, gene_tokens, masked_ranks
from megacell.geneformer.tokens.stream import token_stream
from megacell.geneformer.tokens.token_dataset import TokenFolder, open_cells
from megacell.geneformer.vocabulary.vocabulary import Vocabulary
from megacell.store import CellStore
from megacell.store.sampling.batch_stream import BatchStream
from megacell.store.sampling.cell_set import CellSet
from megacell.store.sampling.order import some_of
from megacell.store.sampling.split import SplitSettings, split_cells
from megacell.training.run.recorded import open_recorded

if TYPE_CHECKING:  # it brings NeMo with it
    from megacell.geneformer.model.geneformer_model import GeneformerModel

SIDES = ("validation", "test")
PREDICTORS = ("model", "frequency", "rank_frequency", "count_arithmetic")
TITLES = ("model", "gene frequency", "frequency at that rank", "count arithmetic")
BATCH_CELLS = 64
FITTED_CELLS = 20_000  # most training cells that the baselines are fitted on
_RIGHT = "right: "


@dataclass(frozen=True)
class Evaluation:
    """Mean loss in nats and accuracy of each predictor, over all masked genes and by group.

    Attributes
    ----------
    rows : list of dict
        ``group``, ``cells``, ``masked_genes``, a loss (or None) and its standard error over cells a predictor, and
        ``accuracy``: of the predictors that name a likeliest gene, how often it is the right one, with its error.
    split : str
        How cells were held out.
    """

    split: str
    fitted_cells: int
    rows: list[dict[str, Any]]

    def to_json(self) -> str:
        """Return it as JSON."""
        return json.dumps(asdict(self), indent=1)

    def table(self) -> str:
        """Return it as text."""
        head = f"{'':24}{'cells':>8}{'masked':>10}" + "".join(f"{title:>26}" for title in TITLES)
        what = "held-out loss in nats (± standard error over cells), and how often the likeliest gene is the right one"
        lines = [f"{what}; {self.split}", head]
        for row in self.rows:
            losses = "".join(f"{_in_words(row[name], row['accuracy'].get(name)):>26}" for name in PREDICTORS)
            lines.append(f"{row['group'][:23]:24}{row['cells']:>8,}{row['masked_genes']:>10,}{losses}")
        return "\n".join(lines)


def _in_words(loss: tuple[float, float] | None, accuracy: tuple[float, float] | None) -> str:
    if loss is None:
        return "not defined"
    return "{:.3f} ± {:.3f}".format(*loss) + (f" {accuracy[0]:7.1%}" if accuracy else "")


def evaluate(
    model_path: Path,
    store_path: Path,
    *,
    by: str | None = None,
    cells: int = 2000,
    side: str = SIDES[0],
    allow_low_coverage: bool = False,
    same_choice: bool = False,
) -> Evaluation:
    """Evaluate a model on the held-out cells of a store, or of a tokenised corpus.

    A model that comes from elsewhere does not tell which cells it has seen: cells are held out from the baselines as
    by default, and masked as Geneformer was trained (15 %, 80/10/10).

    Parameters
    ----------
    model_path : Path
        .nemo file, Hugging Face directory, run or checkpoint.
    store_path : Path
        The one that the model was trained on is opened at the generation it had then.
    by : str, optional
        An obs column: also a row for each of its values.
    cells : int
        Most held-out cells.
    side : str
        "validation", or "test" for the cells that the model's run kept for it.
    allow_low_coverage : bool
        Take a store that measures under 25 % of the vocabulary's genes.
    same_choice : bool
        Apply to another store, too, what the model's run chose its cells by (``data.where``, ``data.exclude``).

    Raises
    ------
    UsageError, DataError
        For a column that is not there, no held-out cell, a store that does not fit the model's vocabulary.
    """
    from megacell.geneformer.interchange.open import open_model

    if cells < 1:
        raise UsageError(f"--cells {cells}: give at least 1")
    model = open_model(model_path)
    store, choice, words = _open(store_path, model, same_choice)
    if by is not None and by not in store.obs_columns:
        raise UsageError(f"--by {by}: {store_path} has no such column; it has {', '.join(store.obs_columns)}")
    coverage_line(store, model.vocabulary, allow=allow_low_coverage)
    data = _data_of(model)
    split, lengths = split_cells(store, SplitSettings(**data.split)), token_lengths(store, model.vocabulary)
    used = cells_in_use(store, lengths, **choice)
    train, held_out = ((CellSet.of(each) & used)[:] for each in (split.train, getattr(split, side)))
    line = f"{'test cells; ' if side == 'test' else ''}{split.line}{words}"
    if not len(train) or not len(held_out):
        raise DataError(f"{store_path}: no cells held out, or none left to fit baselines on ({line})")
    streams = _Streams(store, model, lengths, data)
    train = some_of(train, FITTED_CELLS, data.seed)
    arithmetic, reason = _fit(streams.of(train), store, model)
    held_out = some_of(held_out, cells, data.split.seed)
    losses = _losses(streams.of(held_out), model, arithmetic, with_counts=not reason)
    if reason:
        line += f"; count arithmetic is not defined here: {reason}"
    groups = {"all": np.ones(len(losses["cell"]), bool)}
    if by is not None:
        labels = store.obs_slice([by])[by].astype("string").fillna("(missing)").to_numpy(str)[losses["cell"]]
        groups |= {label: labels == label for label in np.unique(labels)}
    return Evaluation(line, len(train), [_row(group, losses, chosen) for group, chosen in groups.items()])


def _open(path: Path, model: "GeneformerModel", same_choice: bool) -> tuple[Any, dict[str, Any], str]:
    """Open cells: those of the model's run as it saw them, with its choice among them, or others; say so in words.

    A model says itself what its choice was, and it may come from anybody: on cells that are not its own it is applied
    only where that was asked for.
    """
    provenance = model.cfg.provenance

    def opened(path: str | Path, generation: int | None = None) -> Any:
        return open_cells(path, model.vocabulary, generation)

    if "data" not in provenance:
        words = "; the model does not tell which cells it was trained on: these may be among them"
        return opened(path), {}, words
    choice = {name: value for name, value in provenance.data.get("choice", {}).items() if value}
    words = "; the model does not tell which store it was trained on"
    if "store" in provenance:
        try:
            store, grown = open_recorded(path, provenance.store, opened)
            return store, choice, f"; as of generation {store.generation}, before the store grew" if grown else ""
        except DataError:
            words = "; not the cells of the model's own run"
    if choice and not same_choice:
        return opened(path), {}, f"{words}: the choice of cells of that run is not applied (--same-choice applies it)"
    return opened(path), choice, f"{words}, chosen as there" if choice else words


def _data_of(model: "GeneformerModel") -> DictConfig:
    """Return how the model's run held out and masked cells; of a model from elsewhere, how it is done by default."""
    told = model.cfg.provenance.get("data")
    if told is not None:
        return told
    return OmegaConf.create({"split": asdict(SplitSettings()), "masking": asdict(MaskSettings()), "seed": 0})


@dataclass
class _Streams:
    store: CellStore
    model: "GeneformerModel"
    lengths: np.ndarray
    data: DictConfig

    def of(self, cells: np.ndarray) -> BatchStream[MicroBatch]:
        longest, where = self.model.sizes.max_length, next(self.model.bert.parameters()).device
        return token_stream(
            self.store, self.model.vocabulary, cells, self.lengths, max_length=longest,
            global_batch=BATCH_CELLS, token_budget=max(PACK_TOKENS[where.type], longest), multiple_of=1,
            seed=int(self.data.seed), masking=MaskSettings(**self.data.masking), validation=True,
        )  # fmt: skip


def _batches(stream: BatchStream[MicroBatch]) -> Iterator[MicroBatch]:
    for step in range(stream.steps_per_epoch):
        yield from stream.step(step)


def _fit(stream: BatchStream[MicroBatch], store: CellStore, model: "GeneformerModel") -> tuple[CountArithmetic, str]:
    """Fit all three baselines in one pass; a reason is returned where count arithmetic is not defined."""
    vocabulary = model.vocabulary
    arithmetic = CountArithmetic(vocabulary.size, vocabulary.gene_tokens)
    token_of = vocabulary.tokens_of(store.gene_ids, store.symbols)
    reason = "tokens tell no counts" if isinstance(store, TokenFolder) else ""
    for batch in _batches(stream):
        tokens, bounds = gene_tokens(batch, vocabulary)
        if not reason:
            try:
                arithmetic.add(
                    tokens, _counts_of(store, batch.cells, tokens, bounds, token_of, vocabulary.size), bounds
                )
                continue
            except DataError as error:
                reason = str(error)
        arithmetic.frequency.add(tokens, bounds)
    if not reason:
        medians = np.ones(vocabulary.size)
        medians[vocabulary.tokens] = vocabulary.medians
        arithmetic.fit(medians)
    return arithmetic, reason


def _counts_of(
    store: CellStore, cells: np.ndarray, tokens: np.ndarray, bounds: np.ndarray, token_of: np.ndarray, size: int
) -> np.ndarray:
    """Return the counts of flat gene tokens; several genes of one token are summed, as they were for the ranking."""
    import scipy.sparse as sp

    known = np.flatnonzero(token_of >= 0)
    to_tokens = sp.csr_matrix((np.ones(len(known)), (known, token_of[known])), (len(token_of), size))
    by_token = sp.csr_matrix(store.rows(cells), dtype=np.float64) @ to_tokens
    cell = np.repeat(np.arange(len(cells)), np.diff(bounds))
    return np.asarray(by_token[cell, tokens]).ravel()


@torch.inference_mode()
def _losses(
    stream: BatchStream[MicroBatch], model: "GeneformerModel", arithmetic: CountArithmetic, *, with_counts: bool
) -> dict[str, np.ndarray]:
    """Return for each masked gene its cell's global number, every predictor's loss, and which name the right gene."""
    from megacell.geneformer.model.bert import Pack
    from megacell.training.distributed import device

    names = ("cell", *PREDICTORS, *(_RIGHT + name for name in PREDICTORS[:3]))
    found: dict[str, list[np.ndarray]] = {name: [] for name in names}
    where = next(model.bert.parameters()).device
    for batch in _batches(stream):
        with device.single_process():
            nats, likeliest = model.bert.predict(Pack.of(batch, where))
        found["model"].append(nats.float().cpu().numpy())
        rank, genes = masked_ranks(batch, model.vocabulary)
        for name, token in zip(
            PREDICTORS, (likeliest.cpu().numpy(), *arithmetic.frequency.likeliest(rank, genes)), strict=False
        ):
            found[_RIGHT + name].append(token == batch.labels)
        found["frequency"].append(arithmetic.frequency.frequency_nats(batch.labels))
        found["rank_frequency"].append(arithmetic.frequency.rank_frequency_nats(batch.labels, rank, genes))
        if with_counts:
            found["count_arithmetic"].append(_arithmetic_nats(batch, model.vocabulary, arithmetic))
        found["cell"].append(batch.cells[np.searchsorted(batch.cu_seqlens, batch.masked, side="right") - 1])
    return {name: np.concatenate(parts) for name, parts in found.items() if parts}


def _arithmetic_nats(batch: MicroBatch, vocabulary: Vocabulary, arithmetic: CountArithmetic) -> np.ndarray:
    true, bounds = gene_tokens(batch, vocabulary)
    rank, _ = masked_ranks(batch, vocabulary)
    cell = np.searchsorted(batch.cu_seqlens, batch.masked, side="right") - 1
    at = bounds[cell] + rank
    shown = true.copy()
    shown[at] = batch.tokens[batch.masked]
    chosen = np.zeros(len(true), bool)
    chosen[at] = True
    return arithmetic.nats(shown, true, chosen, shown == vocabulary.specials["mask"], bounds)


def _row(group: str, losses: dict[str, np.ndarray], chosen: np.ndarray) -> dict[str, Any]:
    cell, place = np.unique(losses["cell"][chosen], return_inverse=True)
    row: dict[str, Any] = {"group": group, "cells": len(cell), "masked_genes": int(chosen.sum())}
    for name in PREDICTORS:
        row[name] = _mean(losses[name][chosen], place) if name in losses else None
    right = {name: losses[_RIGHT + name][chosen] for name in PREDICTORS if _RIGHT + name in losses}
    return row | {"accuracy": {name: _mean(each, place) for name, each in right.items()}}


def _mean(values: np.ndarray, cell: np.ndarray) -> tuple[float, float]:
    """Return the mean over masked genes, and its standard error: a ratio estimator, as cells are the sample."""
    values, weights = values.astype(np.float64), np.bincount(cell)
    mean = values.mean()
    off = np.bincount(cell, weights=values) - mean * weights
    return float(mean), float(np.sqrt((off**2).sum()) / weights.sum())
