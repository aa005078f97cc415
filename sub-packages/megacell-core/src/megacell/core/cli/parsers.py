# SPDX-License-Identifier: Apache-2.0
"""What sub-commands of several packages share: parsers with examples, the `bench` group, a table of options."""

import argparse
from collections.abc import Sequence
from typing import Any

from megacell.core.errors import printable


def bench_actions(commands: Any) -> Any:
    """Return the sub-parsers of `megacell bench`, made by whichever package asks first."""
    parser = commands.choices.get("bench") or commands.add_parser("bench", help="measure how fast this machine is")
    if parser._subparsers is None:
        parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    return parser._subparsers._group_actions[0]


def table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """Return columns as wide as their widest entry, each as `printable` shows it; the last one runs on."""
    lines = [[printable(text) for text in line] for line in lines]
    widths = [max(map(len, column)) for column in zip(head, *lines, strict=True)]
    rows = (zip(line, widths, strict=True) for line in [head, *lines])
    return "\n".join("  ".join(text.ljust(width) for text, width in row).rstrip() for row in rows)


def add_command(commands: Any, name: str, text: str, epilog: str) -> argparse.ArgumentParser:
    """Add a sub-command whose help ends in examples."""
    parser: argparse.ArgumentParser = commands.add_parser(
        name, help=text, description=f"{text[0].upper()}{text[1:]}.", epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    return parser
