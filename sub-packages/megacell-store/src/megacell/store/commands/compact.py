# SPDX-License-Identifier: Apache-2.0
"""The sub-command compact: small shards merged, earlier generations let go."""

import argparse
from typing import Any

from megacell.store.maintain.pruning import OLDER_THAN

_DESCRIPTION = """\
Merge small shards into full ones, as the next generation of a store. Cells and genes keep their numbers. Programs that
have the store open go on reading their generation. Run again after a kill, it goes on."""


def register_compact(commands: Any) -> None:
    """Add `compact` to argparse's sub-parsers."""
    compact = commands.add_parser("compact", help="merge a store's small shards", description=_DESCRIPTION)
    compact.add_argument("store", metavar="STORE")
    compact.add_argument("--prune", action="store_true", help="remove what only earlier generations need")
    compact.add_argument(
        "--older-than",
        type=float,
        default=OLDER_THAN,
        metavar="HOURS",
        help=f"prune only generations replaced so long ago ({OLDER_THAN:g}); 0 if no program reads the store",
    )
    compact.add_argument("--workers", type=int, metavar="N", help="processes, each merging into a shard (one a core)")
    compact.add_argument("--memory", default="4G", metavar="SIZE", help="that all processes together may take (4G)")
    compact.set_defaults(run=run_compact)


def run_compact(args: argparse.Namespace) -> int:
    """Compact, and print what was done."""
    from megacell.store.commands.convert import log
    from megacell.store.maintain.compaction import compact
    from megacell.store.processes.executors import parse_bytes

    report = compact(
        args.store,
        prune=args.prune,
        older_than=args.older_than,
        workers=args.workers,
        memory=parse_bytes(args.memory),
        progress=True,
        log=log,
    )
    if not report.merged:
        shards = f"{report.shards} shard{'s' * (report.shards != 1)}"
        print(f"nothing to merge: {shards}, each full or unlike the next in its kind of counts")
    if report.pruned:
        print(f"pruned generations {', '.join(map(str, report.pruned))}: {report.freed:,} bytes removed")
    if report.kept:
        mend = f"they were replaced under {args.older_than:g} hours ago" if args.prune else "--prune removes them"
        print(f"earlier generations keep {report.kept:,} bytes of their own; {mend}")
    return 0
