# SPDX-License-Identifier: Apache-2.0
"""The sub-commands about tokens and batches; nothing heavy is imported before a command runs."""

import argparse
from pathlib import Path
from typing import Any

from megacell.core.cli.parsers import add_command, bench_actions


def register_data(commands: Any) -> None:
    """Add the sub-commands to argparse's sub-parsers."""
    _register_tokenize(commands)
    _register_bench(commands)


def _register_tokenize(commands: Any) -> None:
    example = (
        "example:\n  megacell tokenize STORE --vocabulary VOCAB --out DIR\n\n"
        "DIR is what datasets.load_from_disk and Geneformer's scripts load. Started again after a stop, it goes on."
    )
    parser = add_command(commands, "tokenize", "write a store's cells as a Hugging Face dataset of tokens", example)
    parser.add_argument("store", type=Path, metavar="STORE")
    parser.add_argument("--vocabulary", type=Path, required=True, metavar="VOCAB")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="directory to make")
    parser.add_argument("--max-length", type=int, help="most tokens of a cell (default: the vocabulary's)")
    parser.add_argument("--allow-low-coverage", action="store_true", help="take a store of under 25 %% of the genes")
    parser.set_defaults(run=_tokenize)


def _tokenize(args: argparse.Namespace) -> int:
    from megacell.geneformer.tokens.tokenize import tokenize
    from megacell.geneformer.vocabulary.vocabulary import Vocabulary
    from megacell.store import CellStore

    for line in tokenize(
        CellStore.open(args.store), Vocabulary.open(args.vocabulary), args.out,
        max_length=args.max_length, allow_low_coverage=args.allow_low_coverage,
    ):  # fmt: skip
        print(line)
    return 0


def _register_bench(commands: Any) -> None:
    example = "example:\n  megacell bench batches STORE --vocabulary VOCAB --json > figures.json"
    batches = add_command(bench_actions(commands), "batches", "from a store to ranked, masked, packed batches", example)
    batches.add_argument("store", type=Path, metavar="STORE")
    batches.add_argument("--vocabulary", type=Path, required=True, metavar="VOCAB")
    batches.add_argument("--seconds", type=float, default=5.0, help="of each measurement (default: %(default)s)")
    batches.add_argument("--json", action="store_true", help="print it as JSON")
    batches.set_defaults(run=_bench_batches)


def _bench_batches(args: argparse.Namespace) -> int:
    import json

    from megacell.geneformer.bench.batches import bench_batches, table
    from megacell.geneformer.vocabulary.vocabulary import Vocabulary
    from megacell.store import CellStore

    figures = bench_batches(CellStore.open(args.store), Vocabulary.open(args.vocabulary), args.seconds)
    print(json.dumps(figures, indent=1) if args.json else table(figures))
    return 0
