# SPDX-License-Identifier: Apache-2.0
"""The sub-commands convert, info and verify; each imports what is slow to import when it runs."""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megacell.store.errors import DataError

if TYPE_CHECKING:
    from megacell.store.plan import Inspection

_CONVERT = """\
examples:
  megacell convert samples/ --out cells.store --dry-run     look at the files first
  megacell convert samples/ --out cells.store
  megacell convert new.h5ad --out cells.store --append
  megacell convert hvg.h5ad --out cells.store --counts recover --allow-subset
"""


def register(commands: Any) -> None:
    """Add `convert`, `info` and `verify` to argparse's sub-parsers."""
    _register_convert(commands)
    info = commands.add_parser("info", help="say what a cell store holds")
    info.add_argument("store", metavar="STORE")
    info.add_argument("--json", action="store_true", help="print it as JSON")
    info.set_defaults(run=run_info)
    verify = commands.add_parser("verify", help="check every byte of a cell store")
    verify.add_argument("store", metavar="STORE")
    verify.set_defaults(run=run_verify)


def _register_convert(commands: Any) -> None:
    convert = commands.add_parser(
        "convert",
        help="make a cell store of .h5ad files",
        description="Make a cell store of .h5ad files, or add files to one.",
        epilog=_CONVERT,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    convert.add_argument("sources", nargs="+", metavar="SRC", help=".h5ad file, or folder of such files")
    convert.add_argument("--out", required=True, metavar="STORE", help="the store to make")
    convert.add_argument("--append", action="store_true", help="add the files to a store that is there")
    convert.add_argument("--dry-run", action="store_true", help="only look at the files, and say what would be done")
    convert.add_argument(
        "--counts", default="auto", metavar="WHICH", help="auto, X, raw, layer:NAME, or recover (from log1p values)"
    )
    convert.add_argument("--gene-ids", default="auto", metavar="WHERE", help="auto, index, or a column of var")
    convert.add_argument("--species", help="the species of the store (human)")
    convert.add_argument("--allow-subset", action="store_true", help="take files with under 10,000 genes")
    convert.add_argument("--allow-length-normalised", action="store_true", help="take TPM; medians do not apply")
    convert.add_argument("--all-cells", action="store_true", help="keep cells with is_primary_data == False")
    convert.add_argument("--workers", type=int, default=1, metavar="N", help="processes, each making a shard (1)")
    convert.set_defaults(run=run_convert)


def run_convert(args: argparse.Namespace) -> int:
    """Convert, and print what was found and done."""
    from megacell.store.conversion import convert

    report = convert(
        args.sources,
        args.out,
        append=args.append,
        dry_run=args.dry_run,
        counts=args.counts,
        gene_ids=args.gene_ids,
        species=args.species,
        allow_subset=args.allow_subset,
        allow_length_normalised=args.allow_length_normalised,
        all_cells=args.all_cells,
        workers=args.workers,
        progress=True,
        log=print,
    )
    if args.dry_run:
        print(_table(_HEAD, [_found(inspection) for inspection in report.inspections]))
        return int(any(inspection.refused for inspection in report.inspections))
    for source in report.sources:
        size = f"{source.cells:,} cells, {source.genes:,} genes"
        print(f"{source.name}: {size}, {source.kind} counts from {source.matrix}")
        for note in source.notes:
            print(f"  {note}")
    for pair in report.duplicates:
        where = f"{pair.first} and {pair.second}" if pair.first != pair.second else f"{pair.first} more than once"
        print(f"{pair.cells:,} cells stand in {where}")
    return 0


_HEAD = ("file", "cells", "genes", "matrix", "counts", "ids", "species", "verdict")


def _found(inspection: "Inspection") -> tuple[str, ...]:
    """Return one line of the dry run's table."""
    i = inspection
    verdict = f"refused: {i.refused}" if i.refused else "; ".join(["good", *i.notes])
    genes = f"{len(i.gene_ids):,}" if len(i.gene_ids) else ""
    return i.path.name, f"{i.cells:,}" if i.rows else "", genes, i.matrix, i.kind, i.ids, i.species, verdict


def _table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """Return columns as wide as their widest entry; the last one runs on."""
    widths = [max(map(len, column)) for column in zip(head, *lines, strict=True)]
    rows = (zip(line, widths, strict=True) for line in [head, *lines])
    return "\n".join("  ".join(text.ljust(width) for text, width in row).rstrip() for row in rows)


def run_info(args: argparse.Namespace) -> int:
    """Print what the manifest says."""
    from dataclasses import asdict

    from megacell.store.manifest import FORMAT, VERSION, Manifest

    manifest = Manifest.open(Path(args.store))
    size = sum(record.bytes for _, record in manifest.all_files())
    facts: dict[str, Any] = {
        "path": args.store,
        "format": FORMAT,
        "version": VERSION,
        "generation": manifest.generation,
        "digest": manifest.digest,
        "species": manifest.species,
        "cells": manifest.cells,
        "genes": manifest.genes,
        "values": manifest.values,
        "shards": len(manifest.shards),
        "bytes": size,
    }
    if args.json:
        sources = [asdict(source) for source in manifest.sources]
        print(json.dumps({**facts, "sources": sources, "obs": [asdict(c) for c in manifest.obs]}, indent=1))
        return 0
    for name, value in facts.items():
        print(f"{name:<11}{value:,}" if isinstance(value, int) else f"{name:<11}{value}")
    print(f"{'obs':<11}{', '.join(f'{c.name} ({c.kind})' for c in manifest.obs)}\n")
    lines = [
        (s.name, f"{s.cells:,}", f"{s.genes:,}", s.matrix, s.kind, s.ids, "; ".join(s.notes)) for s in manifest.sources
    ]
    print(_table(("source", "cells", "genes", "matrix", "counts", "ids", "notes"), lines))
    return 0


def run_verify(args: argparse.Namespace) -> int:
    """Check a store and name every damage."""
    from megacell.store.manifest import Manifest
    from megacell.store.progress import Progress
    from megacell.store.verify import verify

    with Progress(show=True) as bar:
        total = sum(record.bytes for _, record in Manifest.open(Path(args.store)).all_files())
        bar.start("reading bytes", total)
        found = verify(args.store, bar.advance)
    if not found.damages:
        print(f"{args.store}: {found.files:,} files, {found.bytes:,} bytes, all as they were written")
        return 0
    for damage in found.damages[:-1]:
        print(f"megacell verify: {damage}", file=sys.stderr)
    raise DataError(found.damages[-1] + f" ({len(found.damages)} damaged)" * (len(found.damages) > 1))
