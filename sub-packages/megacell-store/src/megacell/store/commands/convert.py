# SPDX-License-Identifier: Apache-2.0
"""The sub-command convert; it imports what is slow to import when it runs."""

import argparse
import sys
from typing import TYPE_CHECKING, Any

from megacell.core.cli.parsers import table
from megacell.core.errors import UsageError, printable

if TYPE_CHECKING:
    from megacell.store.conversion.conversion import ConversionReport
    from megacell.store.conversion.inspection import Inspection

_EPILOG = """\
examples:
  megacell convert samples/ --out cells.store --dry-run     inspect the files first
  megacell convert samples/ --out cells.store
  megacell convert new.h5ad --out cells.store --append
  megacell convert hvg.h5ad --out cells.store --counts recover --allow-subset
  megacell convert --sheet samples.csv --out cells.store --skip-bad
  megacell convert velocyto.h5ad --out cells.store --counts layers:spliced+unspliced
  megacell convert clustered/ --out cells.store --neighbours connectivities --neighbours distances
  megacell convert atlas/ --out cells.store --part $SLURM_ARRAY_TASK_ID/16      then the same with --finish
"""
_SOURCES = "file (.h5ad .h5mu .loom, 10x .h5) or folder (Zarr, 10x .mtx, or of such files)"


def register_convert(commands: Any) -> None:
    """Add `convert` to argparse's sub-parsers."""
    convert = commands.add_parser(
        "convert",
        help="make a cell store of .h5ad and other files",
        description="Make a cell store of files of cells, or add files to one. Run again after a kill, it goes on.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    convert.add_argument("sources", nargs="*", metavar="SRC", help=_SOURCES)
    convert.add_argument("--out", required=True, metavar="STORE", help="the store to make")
    convert.add_argument(
        "--sheet", metavar="CSV", help="files by column path, with counts, gene_ids, obs columns of each"
    )
    convert.add_argument("--append", action="store_true", help="add the files to a store that is there")
    convert.add_argument("--dry-run", action="store_true", help="only inspect the files, and print what would be done")
    _register_reading(convert.add_argument_group("what is read"))
    _register_work(convert.add_argument_group("how the work is done"))
    convert.set_defaults(run=run_convert)


def _register_reading(group: Any) -> None:
    which = "auto, X, raw, layer:NAME, layers:A+B (a sum), or recover (from log1p values)"
    group.add_argument("--counts", default="auto", metavar="WHICH", help=which)
    group.add_argument("--gene-ids", default="auto", metavar="WHERE", help="auto, index, or a column of var")
    group.add_argument("--id-map", metavar="CSV", help="two columns: the name of a gene in files, and its id")
    group.add_argument("--species", help="the species of the store (human)")
    group.add_argument("--where", metavar="QUERY", help="keep these cells, such as 'tissue == \"lung\" and age > 50'")
    group.add_argument("--min-counts", type=float, default=0, metavar="N", help="keep cells with at least N counts")
    group.add_argument("--min-genes", type=int, default=0, metavar="N", help="keep cells with at least N genes")
    group.add_argument("--allow-subset", action="store_true", help="take files with under 10,000 genes")
    group.add_argument("--allow-length-normalised", action="store_true", help="take TPM; medians do not apply")
    group.add_argument(
        "--allow-low-counts", action="store_true", help="take files with a median under 200 counts a cell"
    )
    group.add_argument("--all-cells", action="store_true", help="keep cells with is_primary_data or filter_pass False")
    group.add_argument(
        "--neighbours",
        action="append",
        default=[],
        metavar="NAME",
        help="keep this graph of obsp, such as connectivities; may be given again",
    )


def _register_work(group: Any) -> None:
    group.add_argument("--skip-bad", action="store_true", help="leave refused files out; exit 1 tells that some were")
    group.add_argument("--workers", type=int, metavar="N", help="processes, each making a shard (one a core)")
    group.add_argument("--memory", default="4G", metavar="SIZE", help="that all processes together may take (4G)")
    group.add_argument("--part", metavar="i/n", help="make part i of n, on a machine of its own; --finish commits")
    group.add_argument("--finish", action="store_true", help="commit what the parts made")
    group.add_argument("--scheduler", metavar="tcp://…", help="a Dask scheduler whose workers do the work")


def run_convert(args: argparse.Namespace) -> int:
    """Convert, and print what was found and done."""
    from megacell.store.conversion.conversion import convert
    from megacell.store.processes.executors import parse_bytes

    if not args.sources and args.sheet is None:
        raise UsageError("nothing to convert; name files or folders, or --sheet")
    if args.finish and args.part:
        raise UsageError("--part makes a part, --finish commits all of them; give one of the two")
    report = convert(
        args.sources,
        args.out,
        sheet=args.sheet,
        append=args.append,
        dry_run=args.dry_run,
        counts=args.counts,
        gene_ids=args.gene_ids,
        id_map=args.id_map,
        species=args.species,
        where=args.where,
        min_counts=args.min_counts,
        min_genes=args.min_genes,
        allow_subset=args.allow_subset,
        allow_length_normalised=args.allow_length_normalised,
        allow_low_counts=args.allow_low_counts,
        all_cells=args.all_cells,
        neighbours=args.neighbours,
        skip_bad=args.skip_bad,
        workers=args.workers,
        memory=parse_bytes(args.memory),
        scheduler=args.scheduler,
        part=_part(args.part),
        finish=args.finish,
        progress=True,
        log=log,
    )
    if args.dry_run:
        print(table(_HEAD, [_line(inspection) for inspection in report.inspections]))
        return int(not report.cells or any(inspection.refused for inspection in report.inspections))
    return print_report(report)


def log(line: str) -> None:
    """Print a line, which may name files."""
    print(printable(line))


def _part(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    number, _, of = text.partition("/")
    if not (number.isdecimal() and of.isdecimal()):
        raise UsageError(f"--part {text}: give i/n, such as 3/16")
    return int(number), int(of)


def print_report(report: "ConversionReport") -> int:
    """Print what was done; exit code 1 if files were left out."""
    for source in report.sources:
        size = f"{source.cells:,} cells, {source.genes:,} genes"
        print(printable(f"{source.name}: {size}, {source.kind} counts from {source.matrix}"))
        for note in source.notes:
            print(f"  {printable(note)}")
    for pair in report.duplicates:
        print(printable(pair))
    for reason in report.left_out:
        print(f"megacell convert: left out: {printable(reason)}", file=sys.stderr)
    return int(bool(report.left_out))


_HEAD = ("file", "cells", "genes", "matrix", "counts", "ids", "species", "verdict")


def _line(inspection: "Inspection") -> tuple[str, ...]:
    """Return one line of the dry run's table."""
    i = inspection
    outcome = "good" if i.cells else f"no cell would be kept: {i.mend_for_none}"
    verdict = f"refused: {i.refused}" if i.refused else "; ".join([outcome, *i.notes])
    genes = f"{i.genes:,}" if i.genes else ""
    return i.path.name, f"{i.cells:,}" if i.rows else "", genes, i.matrix, i.kind, i.ids, i.species, verdict
