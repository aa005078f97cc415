# SPDX-License-Identifier: Apache-2.0
"""The sub-command report, and what `megacell info --html` shows of vocabularies; imports late what is slow."""

import argparse
from pathlib import Path
from typing import Any

_EPILOG = """\
examples:
  megacell report RUN                                  RUN/report.html: what the run has left so far
  megacell report RUN --evaluate                       with all baselines, count arithmetic too
  megacell embed RUN STORE --out RUN/embedded.h5ad
  megacell report RUN --by cell_type                   with a UMAP of held-out cells
"""


def register_report(commands: Any) -> None:
    """Add `report` to argparse's sub-parsers, and vocabularies to `info`."""
    report = commands.add_parser(
        "report",
        help="write a run as one HTML page that opens anywhere",
        description="Write a run as one HTML page that opens anywhere, and prints; it needs no network.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    report.add_argument("run_folder", type=Path, metavar="RUN")
    report.add_argument("--out", type=Path, metavar="FILE", help="default: RUN/report.html")
    report.add_argument("--store", type=Path, help="where the run's store is now (default: where it was)")
    report.add_argument("--evaluate", action="store_true", help="evaluate first, and keep it as RUN/evaluation.json")
    report.add_argument(
        "--embedded", type=Path, metavar="F.h5ad", help="what embed made of the store (default: RUN/embedded.h5ad)"
    )
    report.add_argument("--by", metavar="COLUMN", help="obs column that colours the cells of the UMAP")
    report.set_defaults(run=_report)
    info = commands.choices["info"]
    info.add_argument(
        "--vocabulary",
        type=Path,
        action="append",
        default=[],
        help="with --html: also how many of its genes are measured",
    )
    info.get_default("sections").append(_coverage)


def _report(args: argparse.Namespace) -> int:
    from megacell.geneformer.report.run_page import report

    out = args.out or args.run_folder / "report.html"
    for line in report(
        args.run_folder, out, store=args.store, embedded=args.embedded, by=args.by, evaluate_first=args.evaluate
    ):
        print(line)
    print(f"{out}: {out.stat().st_size / 2**10:,.0f} KiB")
    return 0


def _coverage(page: Any, store: Any, args: argparse.Namespace) -> None:
    from megacell.geneformer.report.coverage import coverage_section
    from megacell.geneformer.vocabulary.vocabulary import Vocabulary

    if args.vocabulary:
        coverage_section(page, store, [Vocabulary.open(path) for path in args.vocabulary])
