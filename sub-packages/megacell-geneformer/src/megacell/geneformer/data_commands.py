# SPDX-License-Identifier: Apache-2.0
"""The sub-commands about tokens and batches; nothing heavy is imported before a command runs."""

import argparse
from pathlib import Path
from typing import Any


def register_data(commands: Any) -> None:
    """Add the sub-commands to argparse's sub-parsers."""
    _register_bench(commands)


def _add(commands: Any, name: str, text: str, epilog: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        name, help=text, description=f"{text[0].upper()}{text[1:]}.", epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    return parser


def _register_bench(commands: Any) -> None:
    example = "example:\n  megacell bench batches STORE --vocabulary VOCAB --json > figures.json"
    parser = _add(commands, "bench", "measure how fast this machine is", example)
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    batches = actions.add_parser("batches", help="from a store to ranked, masked, packed batches")
    batches.add_argument("store", type=Path, metavar="STORE")
    batches.add_argument("--vocabulary", type=Path, required=True, metavar="VOCAB")
    batches.add_argument("--seconds", type=float, default=5.0, help="of each measurement (default: %(default)s)")
    batches.add_argument("--json", action="store_true", help="print it as JSON")
    batches.set_defaults(run=_bench_batches)


def _bench_batches(args: argparse.Namespace) -> int:
    import json

    from megacell.geneformer.bench import bench_batches, table
    from megacell.geneformer.vocabulary import Vocabulary
    from megacell.store import CellStore

    figures = bench_batches(CellStore.open(args.store), Vocabulary.open(args.vocabulary), args.seconds)
    print(json.dumps(figures, indent=1) if args.json else table(figures))
    return 0
