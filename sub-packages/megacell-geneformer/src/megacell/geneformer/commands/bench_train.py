# SPDX-License-Identifier: Apache-2.0
"""The sub-command bench train; nothing heavy is imported before it runs."""

import argparse
from pathlib import Path
from typing import Any

from megacell.core.cli.parsers import add_command, bench_actions

REFERENCES = ("hugging_face", "hugging_face_grouped", "stock_megatron")
_EXAMPLES = """\
examples:
  megacell bench train store=STORE vocabulary=VOCAB model=geneformer_10m --json figures.json --chart figures.png
  megacell bench train store=STORE vocabulary=VOCAB model=geneformer_10m --batches 16,32 --precisions fp16,fp32
  megacell bench train store=STORE vocabulary=VOCAB model=geneformer_106m precision=bf16 batch.cells=2048 devices=8 \
    --references none

Real tokens only are counted. Every contender trains on the same cells in a process of its own; one that fails is named,
the others are measured, and the exit status is 1.
"""


def register_bench_train(commands: Any) -> None:
    """Add `bench train`."""
    train = add_command(bench_actions(commands), "train", "real tokens a second in training, beside others", _EXAMPLES)
    train.add_argument("settings", nargs="+", metavar="OPTION=VALUE", help="as for `megacell pretrain`, without out=")
    train.add_argument(
        "--references", default=",".join(REFERENCES), help="what to measure beside it, or none (default: %(default)s)"
    )
    train.add_argument(
        "--batches", default="16", help="cells a step; ours has batch.cells=… instead, if given (default: %(default)s)"
    )
    train.add_argument("--precisions", help="to measure each in, such as fp16,fp32 (default: precision=… alone)")
    add_protocol(train)
    train.add_argument("--json", type=Path, metavar="FILE", help="write the figures here")
    train.add_argument("--chart", type=Path, metavar="FILE", help="draw them here (.png, .svg)")
    train.set_defaults(run=run_bench_train)


def add_protocol(parser: argparse.ArgumentParser) -> None:
    """Add the options that say how long is measured."""
    parser.add_argument("--warmup", type=int, default=20, help="steps before anything counts (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=200, help="of a window (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=30.0, help="of a window, at most (default: %(default)s)")
    parser.add_argument("--windows", type=int, default=3, help="whose median counts (default: %(default)s)")


def run_bench_train(args: argparse.Namespace) -> int:
    """Measure, print, write."""
    import json

    from megacell.core.errors import UsageError
    from megacell.geneformer.bench.train import Protocol, bench_train
    from megacell.geneformer.bench.train_report import chart, table
    from megacell.training.nn.layout import PRECISIONS

    references = [] if args.references == "none" else args.references.split(",")
    if wrong := sorted(set(references) - set(REFERENCES)):
        raise UsageError(f"--references {wrong[0]}: choose of {', '.join(REFERENCES)}, or none")
    if not all(size.isdecimal() and int(size) for size in args.batches.split(",")):
        raise UsageError(f"--batches {args.batches}: give numbers of cells, such as 16,32")
    precisions = args.precisions.split(",") if args.precisions else []
    if wrong := sorted(set(precisions) - set(PRECISIONS)):
        raise UsageError(f"--precisions {wrong[0]}: choose of {', '.join(PRECISIONS)}")
    protocol = Protocol(args.warmup, args.steps, args.seconds, args.windows)
    batches = [int(size) for size in args.batches.split(",")]
    figures = bench_train(args.settings, references, batches, precisions, protocol)
    print(table(figures))
    if args.json:
        args.json.write_text(json.dumps(figures, indent=1) + "\n")
    if args.chart:
        chart(figures, args.chart)
    return 1 if figures["failed"] else 0
