# SPDX-License-Identifier: Apache-2.0
"""The sub-command verify: every byte of a store against its checksums."""

import argparse
import sys
from typing import Any

from megacell.core.errors import DataError, printable


def register_verify(commands: Any) -> None:
    """Add `verify` to argparse's sub-parsers."""
    verify = commands.add_parser("verify", help="check every byte of a cell store")
    verify.add_argument("store", metavar="STORE")
    verify.set_defaults(run=run_verify)


def run_verify(args: argparse.Namespace) -> int:
    """Check a store and print every damage."""
    from megacell.core.progress import Progress
    from megacell.store.format.verify import verify

    with Progress(show=True) as bar:
        result = verify(args.store, lambda total: bar.start("reading bytes", total), bar.advance)
    if not result.damages:
        print(f"{printable(args.store)}: {result.files:,} files, {result.bytes:,} bytes, all as they were written")
        return 0
    for damage in result.damages[:-1]:
        print(f"megacell verify: {printable(damage)}", file=sys.stderr)
    raise DataError(result.damages[-1] + f" ({len(result.damages)} damaged)" * (len(result.damages) > 1))
