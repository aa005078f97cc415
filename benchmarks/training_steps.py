# SPDX-License-Identifier: Apache-2.0
"""Training steps of Megacell, Hugging Face and stock Megatron by turns in one process: CPU-seconds a real token.

    python benchmarks/training_steps.py CELLS GENEFORMER OPTION=VALUE... [--batch 4] [--rounds 5] [--json FILE]

CELLS: a folder of .h5ad files. GENEFORMER: a folder with V2's dictionaries. The rest are options of `megacell
pretrain`. `megacell bench train` measures by the clock, one contender after the other: where others are at work, or a
machine is lent out twice, what it finds depends on the minute. Here every round has a step of each, and CPU-seconds
count. The first round, which fills memory for the first time, is left out.
"""

import argparse
import itertools
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from dictionaries import WITH_NAMES, published_vocabulary
from omegaconf import DictConfig

from megacell.core.machine import where_and_when
from megacell.geneformer.bench.train_references import CONTENDERS, contender
from megacell.geneformer.model.bert import Pack, PackedBert
from megacell.geneformer.model.initial_weights import initialise
from megacell.geneformer.pretraining.data import TrainingData
from megacell.geneformer.pretraining.settings import model_config
from megacell.store import convert
from megacell.training.config import settings
from megacell.training.distributed import device

Prepared = tuple[int, Callable[[], object]]  # real tokens of a step, and the step


def ours(cfg: DictConfig) -> Iterator[Prepared]:
    """Yield steps of Megacell."""
    from megacell.training.engine import Engine

    data = TrainingData.open(cfg)
    network = model_config(cfg, data.vocabulary.size)
    bert = PackedBert(network, settings.layout(cfg)).to(device.device())
    initialise(bert, network, cfg.seed)
    engine, stream = Engine(cfg, bert), data.stream()

    def train(packs: list[Pack], step: int) -> None:
        device.seed_step(cfg.seed, step)
        engine.train_step(packs)

    for step in itertools.count():
        made = stream.step(step)
        packs = [Pack.of(each, device.device()) for each in made]
        yield sum(each.n_tokens for each in made), partial(train, packs, step)


def reference(name: str, cfg: DictConfig, batch: int) -> Iterator[Prepared]:
    """Yield steps of a contender of `megacell bench train`."""
    step, endless = contender(name, cfg, batch)
    for made in endless:
        yield int(made.real.sum()), partial(step, made)


def by_turns(cfg: DictConfig, batch: int, rounds: int) -> dict[str, list[dict[str, float]]]:
    """Return each step's CPU-seconds and seconds a thousand real tokens, by contender."""
    contenders = {"megacell": ours(cfg), **{name: reference(name, cfg, batch) for name in CONTENDERS}}
    found: dict[str, list[dict[str, float]]] = {name: [] for name in contenders}
    for turn in range(rounds + 1):
        for name, steps in contenders.items():
            tokens, step = next(steps)
            wall, cpu = time.perf_counter(), time.process_time()
            step()
            cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
            found[name].append({"cpu_seconds": cpu / tokens * 1e3, "seconds": wall / tokens * 1e3, "tokens": tokens})
            print(f"{turn} {name}: {found[name][-1]['cpu_seconds']:.3f} CPU-seconds a thousand real tokens", flush=True)
    return {name: each[1:] for name, each in found.items()}


def main() -> int:
    """Convert, import, measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cells", type=Path, metavar="CELLS")
    parser.add_argument("geneformer", type=Path, metavar="GENEFORMER")
    parser.add_argument("--batch", type=int, default=4, help="cells a step of the others (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="after the first (default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here")
    args, overrides = parser.parse_known_args()
    device.quiet()
    figures: dict[str, Any] = {**where_and_when(), "threads": torch.get_num_threads(), "torch": torch.__version__}
    with tempfile.TemporaryDirectory() as folder, device.single_process():
        convert([args.cells], Path(folder) / "store")
        published_vocabulary(args.geneformer, WITH_NAMES).save(Path(folder) / "vocabulary")
        where = [f"store={folder}/store", f"vocabulary={folder}/vocabulary", f"out={folder}/run"]
        cfg = settings.compose([*where, *overrides])
        steps = by_turns(cfg, args.batch, args.rounds)
    medians = {name: statistics.median(step["cpu_seconds"] for step in each) for name, each in steps.items()}
    times = {name: cpu / medians["megacell"] for name, cpu in medians.items() if name != "megacell"}
    cells = {"megacell": cfg.batch.cells, "others": args.batch}
    figures |= {"overrides": overrides, "cells": cells, "cpu_seconds": medians, "times": times, "steps": steps}
    print(json.dumps({"cpu_seconds": medians, "times": times}, indent=1))
    if args.json:
        args.json.write_text(json.dumps(figures, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
