# SPDX-License-Identifier: Apache-2.0
"""What `megacell bench train` is measured against: Hugging Face's BertForMaskedLM, and Megatron's BERT as it comes.

Both see the same cells, masked by the same rule, as padded batches, and compute the head at every position. Run as a
script in a process of its own (memory is that of one contender), it prints one JSON line a window of steps.
"""

import itertools
import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig, OmegaConf

from megacell.geneformer.pretraining.data import TrainingData
from megacell.geneformer.pretraining.settings import model_config
from megacell.geneformer.tokens.packing import MicroBatch
from megacell.store.sampling.batch_stream import BatchStream
from megacell.training.distributed import device

GROUPED = 50  # batches that are sorted by length together, as Hugging Face's sampler does
IGNORED = -100  # Hugging Face's label where nothing is predicted


@dataclass
class Padded:
    """Cells as a padded batch (C cells, S tokens of the longest).

    Attributes
    ----------
    tokens, labels : int64 [C, S]
        Labels are `IGNORED` where nothing is predicted.
    real : bool [C, S]
        False where padded.
    """

    tokens: torch.Tensor
    labels: torch.Tensor
    real: torch.Tensor


def padded(pack: MicroBatch, part: np.ndarray, pad: int) -> Padded:
    """Make one padded batch of some of a pack's cells, by their places in it."""
    bounds = pack.cu_seqlens.astype(np.int64)
    lengths = np.diff(bounds)[part]
    places = np.arange(lengths.max())
    real = places < lengths[:, None]
    at = np.where(real, bounds[part][:, None] + places, 0)
    labels = np.full(len(pack.tokens), IGNORED, np.int64)
    labels[pack.masked] = pack.labels
    arrays = np.where(real, pack.tokens[at], pad), np.where(real, labels[at], IGNORED), real
    return Padded(*(torch.from_numpy(array) for array in arrays))


def batches(stream: BatchStream[MicroBatch], size: int, pad: int, *, grouped: bool) -> Iterator[Padded]:
    """Yield padded batches for ever: random ones, or of cells of like length, in random order."""
    rng = np.random.default_rng(0)
    for k in range(sys.maxsize):
        (pack,) = stream.step(k)
        cells = np.arange(len(pack.cells))
        if grouped:
            cells = np.argsort(np.diff(pack.cu_seqlens)[cells], kind="stable")
        parts = [cells[i : i + size] for i in range(0, len(cells), size)]
        for i in rng.permutation(len(parts)):
            yield padded(pack, parts[i], pad)


Step = Callable[[Padded], None]


def hugging_face(cfg: DictConfig, vocabulary_size: int) -> Step:
    """Return a training step of ``BertForMaskedLM``: SDPA attention, AdamW, clipping, autocast in 16 bits."""
    from transformers import BertConfig, BertForMaskedLM

    model, optim = cfg.model, cfg.optim
    maker: Any = BertForMaskedLM
    network = maker(
        BertConfig(
            vocab_size=vocabulary_size,
            hidden_size=model.hidden,
            num_hidden_layers=model.layers,
            num_attention_heads=model.heads,
            intermediate_size=model.ffn,
            hidden_act="relu",
            hidden_dropout_prob=model.hidden_dropout,
            attention_probs_dropout_prob=model.attention_dropout,
            max_position_embeddings=model.max_length,
        )
    ).to(device.device())
    optimizer = torch.optim.AdamW(
        network.parameters(), optim.lr, (optim.beta1, optim.beta2), optim.eps, optim.weight_decay
    )
    network.train()
    where, dtype = device.device().type, torch.float16 if cfg.precision == "fp16" else torch.bfloat16
    scaler = torch.amp.GradScaler(where, enabled=cfg.precision == "fp16")

    def step(batch: Padded) -> None:
        with torch.autocast(where, dtype, enabled=cfg.precision != "fp32"):
            loss = network(batch.tokens, attention_mask=batch.real.long(), labels=batch.labels).loss
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(network.parameters(), optim.clip)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()

    return step


def stock_megatron(cfg: DictConfig, vocabulary_size: int) -> Step:
    """Return a training step of Megatron-core's BERT with its own local attention, under the same engine as ours."""
    from megatron.core.models.bert.bert_layer_specs import bert_layer_local_spec
    from megatron.core.models.bert.bert_model import BertModel

    from megacell.geneformer.model.config import megatron_config
    from megacell.training.engine import Engine
    from megacell.training.nn.layout import Layout

    sizes = model_config(cfg, vocabulary_size)

    class StockBert(BertModel):
        def forward(self, batch: Padded) -> torch.Tensor:
            chosen = batch.labels != IGNORED
            loss, _ = super().forward(batch.tokens, batch.real.long(), lm_labels=batch.labels.clamp(min=0))
            return loss[chosen]

    bert = StockBert(
        config=megatron_config(sizes, Layout(precision=cfg.precision)),
        num_tokentypes=0,
        transformer_layer_spec=bert_layer_local_spec,
        vocab_size=sizes.padded_vocabulary,
        max_sequence_length=sizes.max_length,
        share_embeddings_and_output_weights=True,
        parallel_output=True,
        add_binary_head=False,
    )
    engine = Engine(cfg, bert.to(device.device(), bert.config.params_dtype))
    bert.train()
    steps = itertools.count()

    def step(batch: Any) -> None:
        device.seed_step(cfg.seed, next(steps))
        engine.train_step([batch])

    return step


CONTENDERS: dict[str, tuple[Callable[[DictConfig, int], Step], bool]] = {  # maker, grouped by length
    "hugging_face": (hugging_face, False),
    "hugging_face_grouped": (hugging_face, True),
    "stock_megatron": (stock_megatron, False),
}


def contender(name: str, cfg: DictConfig, batch: int) -> tuple[Step, Iterator[Padded]]:
    """Return a contender's training step, and its batches of so many cells, for ever."""
    cells = batch * GROUPED
    whole = {"batch": {"cells": cells, "tokens": cells * cfg.model.max_length}}  # one pack, to be cut up here
    data = TrainingData.open(DictConfig(OmegaConf.merge(cfg, whole)))
    stream = data.stream()
    make, grouped = CONTENDERS[name]
    torch.manual_seed(cfg.seed)
    step = make(cfg, data.vocabulary.size)
    return step, batches(stream, batch, data.vocabulary.specials["pad"], grouped=grouped)


def run(name: str, cfg: DictConfig, batch: int, protocol: dict[str, float]) -> Iterator[dict[str, float]]:
    """Train one contender; yield what it did, window by window, after the warm-up.

    Parameters
    ----------
    name : str
        One of `CONTENDERS`.
    cfg : DictConfig
        Of `megacell pretrain`.
    batch : int
        Cells of one step.
    protocol : dict
        ``warmup`` and ``steps`` (least of a window), ``seconds`` (of a window), ``windows``.
    """
    step, endless = contender(name, cfg, batch)
    for _ in range(int(protocol["warmup"])):
        _timed(step, next(endless))
    for _ in range(int(protocol["windows"])):
        sums = dict.fromkeys(("seconds", "tokens", "padded_tokens", "cells", "steps", "data_seconds"), 0.0)
        while sums["seconds"] < protocol["seconds"] and sums["steps"] < protocol["steps"]:
            start = time.perf_counter()
            made = next(endless)
            sums["data_seconds"] += time.perf_counter() - start
            sums["seconds"] += time.perf_counter() - start + _timed(step, made)
            sums["tokens"] += int(made.real.sum())
            sums["padded_tokens"] += made.real.numel()
            sums["cells"] += len(made.real)
            sums["steps"] += 1
        yield sums


def _timed(step: Step, batch: Padded) -> float:
    start, where = time.perf_counter(), device.device()
    step(Padded(*(tensor.to(where, non_blocking=True) for tensor in (batch.tokens, batch.labels, batch.real))))
    if where.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def main(arguments: list[str]) -> None:
    """Run the contender that a JSON object describes."""
    from megacell.training.run.metrics import memory_gib

    device.quiet()
    given: dict[str, Any] = json.loads(arguments[0])
    cfg = OmegaConf.create(given["cfg"])
    assert isinstance(cfg, DictConfig)
    with device.single_process():
        for window in run(given["name"], cfg, given["batch"], given["protocol"]):
            print(json.dumps({**window, "memory_gib": memory_gib()}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
