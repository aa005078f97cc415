# SPDX-License-Identifier: Apache-2.0
"""The sub-command scdl: cells from and to archives of bionemo-scdl."""

import argparse
from typing import Any


def register_scdl(commands: Any) -> None:
    """Add `scdl import` and `scdl export` to argparse's sub-parsers."""
    scdl = commands.add_parser("scdl", help="read and write archives of bionemo-scdl 0.1.3")
    actions = scdl.add_subparsers(dest="action", metavar="ACTION", required=True)
    importing = actions.add_parser("import", help="make a cell store of an archive; faults are repaired or refused")
    importing.add_argument("archive", metavar="ARCHIVE")
    importing.add_argument("--out", required=True, metavar="STORE")
    importing.add_argument("--gene-ids", default="auto", metavar="COLUMN", help="auto, or a column of var_features")
    importing.add_argument("--species", help="the species of the store (human)")
    importing.add_argument("--allow-subset", action="store_true", help="take an archive with under 10,000 genes")
    importing.add_argument("--allow-low-counts", action="store_true", help="take a median under 200 counts a cell")
    importing.add_argument("--neighbours", metavar="NAME", help="keep the archive's graph, and call it so")
    importing.set_defaults(run=run_import)
    exporting = actions.add_parser("export", help="write a store as an archive")
    exporting.add_argument("store", metavar="STORE")
    exporting.add_argument("--out", required=True, metavar="ARCHIVE")
    exporting.add_argument("--neighbours", metavar="NAME", help="write this graph of the store too")
    exporting.set_defaults(run=run_export)


def run_import(args: argparse.Namespace) -> int:
    """Convert the archive."""
    from megacell.store.commands.convert import log, print_report
    from megacell.store.conversion.conversion import convert

    report = convert(
        args.archive,
        args.out,
        gene_ids=args.gene_ids,
        species=args.species,
        allow_subset=args.allow_subset,
        allow_low_counts=args.allow_low_counts,
        neighbours=args.neighbours or (),
        workers=None,
        progress=True,
        log=log,
    )
    return print_report(report)


def run_export(args: argparse.Namespace) -> int:
    """Write the archive."""
    from megacell.store.commands.convert import log
    from megacell.store.maintain.export_scdl import export_scdl
    from megacell.store.read.cell_store import CellStore

    store = CellStore.open(args.store)
    export_scdl(store, args.out, args.neighbours)
    log(f"wrote {args.out}: {store.shape[0]:,} cells, {store.shape[1]:,} genes")
    return 0
