# SPDX-License-Identifier: Apache-2.0
"""What `compile=true` gains: training steps with it and without, by turns, over the same cells.

    python benchmarks/compiled.py CELLS GENEFORMER OPTION=VALUE... [--steps 8] [--json FILE]

CELLS: a folder of .h5ad files. GENEFORMER: a folder with V2's dictionaries. The rest are options of `megacell
pretrain`. A step's figures are CPU-seconds of the process and seconds by the clock, a thousand real tokens; the first
step of each, which compiles, is left out. Where others are at work only CPU-seconds mean anything.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from dictionaries import WITH_NAMES, published_vocabulary

from megacell.core.machine import where_and_when
from megacell.geneformer.model.bert import Pack, PackedBert
from megacell.geneformer.model.initial_weights import initialise
from megacell.geneformer.pretraining.data import TrainingData
from megacell.geneformer.pretraining.settings import model_config
from megacell.store import convert
from megacell.training.config import settings
from megacell.training.distributed import device

FIGURES = ("cpu_seconds", "seconds")
DROPOUTS = {
    "dropout of the model": [],
    "no dropout": ["model.hidden_dropout=0", "model.attention_dropout=0"],
}


def by_turns(overrides: list[str], steps: int) -> dict[str, Any]:
    """Return the figures of each step, compiled and not."""
    from megacell.training.engine import Engine

    runs: dict[str, list[dict[str, float]]] = {"compile=false": [], "compile=true": []}
    engines, data = {}, TrainingData.open(settings.compose(overrides))
    stream = data.stream()
    for name in runs:
        cfg = settings.compose([*overrides, name])
        network = model_config(cfg, data.vocabulary.size)
        bert = PackedBert(network, settings.layout(cfg)).to(device.device())
        initialise(bert, network, cfg.seed)
        engines[name] = Engine(cfg, bert)
    for step in range(steps + 1):
        batch = stream.step(step)
        tokens = sum(each.n_tokens for each in batch)
        for name in sorted(runs, reverse=bool(step % 2)):  # neither is always the first
            packs = [Pack.of(each, device.device()) for each in batch]
            device.seed_step(0, step)
            wall, cpu = time.perf_counter(), time.process_time()
            result = engines[name].train_step(packs)
            cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
            found = {"cpu_seconds": cpu / tokens * 1e3, "seconds": wall / tokens * 1e3, "tokens": tokens}
            runs[name].append({**found, "loss": result.loss_sum / result.items})
            print(f"step {step}, {name}: {found['cpu_seconds']:.3f} CPU-seconds a thousand tokens", flush=True)
    return {name: found[1:] for name, found in runs.items()}


def ratios(runs: dict[str, Any], figure: str) -> dict[str, float]:
    """Return what a step takes compiled, as a share of what the same step takes without: median, least, most."""
    with_it, without = ([each[figure] for each in runs[f"compile={which}"]] for which in ("true", "false"))
    each = [one / other for one, other in zip(with_it, without, strict=True)]
    return {"median": statistics.median(each), "least": min(each), "most": max(each)}


def main() -> int:
    """Convert, import, measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cells", type=Path, metavar="CELLS")
    parser.add_argument("geneformer", type=Path, metavar="GENEFORMER")
    parser.add_argument("--steps", type=int, default=8, help="of each, after the first (default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here")
    args, overrides = parser.parse_known_args()
    device.quiet()
    with tempfile.TemporaryDirectory() as folder, device.single_process():
        convert([args.cells], Path(folder) / "store")
        published_vocabulary(args.geneformer, WITH_NAMES).save(Path(folder) / "vocabulary")
        where = [f"store={folder}/store", f"vocabulary={folder}/vocabulary", f"out={folder}/run"]
        versions = {"threads": torch.get_num_threads(), "torch": torch.__version__}
        figures: dict[str, Any] = {**where_and_when(), **versions, "overrides": overrides}
        for name, dropout in DROPOUTS.items():
            print(name)
            runs = by_turns([*where, *overrides, *dropout], args.steps)
            figures[name] = {"compiled_of_not": {each: ratios(runs, each) for each in FIGURES}, "steps": runs}
            print(json.dumps(figures[name]["compiled_of_not"], indent=1))
    if args.json:
        args.json.write_text(json.dumps(figures, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
