# SPDX-License-Identifier: Apache-2.0
"""The sub-commands of the store; each imports what is slow to import when it runs."""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from megacell.core.cli.completion import register_completion
from megacell.core.cli.doctor import register_doctor
from megacell.core.cli.parsers import table
from megacell.core.errors import DataError
from megacell.store.commands.bench import register_bench
from megacell.store.commands.compact import register_compact
from megacell.store.commands.convert import register_convert
from megacell.store.commands.scdl import register_scdl


def register(commands: Any) -> None:
    """Add this package's sub-commands to argparse's sub-parsers."""
    register_convert(commands)
    register_compact(commands)
    register_scdl(commands)
    register_bench(commands)
    register_doctor(commands)
    register_completion(commands)
    info = commands.add_parser("info", help="say what a cell store holds")
    info.add_argument("store", metavar="STORE")
    info.add_argument("--duplicates", action="store_true", help="count exact copies of cells, by pair of sources")
    info.add_argument("--json", action="store_true", help="print it as JSON")
    info.add_argument("--html", type=Path, metavar="FILE", help="write it as a page with charts instead")
    info.set_defaults(run=run_info, sections=[])
    verify = commands.add_parser("verify", help="check every byte of a cell store")
    verify.add_argument("store", metavar="STORE")
    verify.set_defaults(run=run_verify)
    overlap = commands.add_parser("overlap", help="count the cells of a store that another one holds too")
    overlap.add_argument("store", metavar="STORE", help="the cells asked about, of an evaluation say")
    overlap.add_argument("other", metavar="STORE|MODEL", help="where they are looked for")
    overlap.set_defaults(run=run_overlap)


def run_info(args: argparse.Namespace) -> int:
    """Print what the manifest says, or write it as a page."""
    if args.html:
        from megacell.store.commands.info_page import write_page
        from megacell.store.read.cell_store import CellStore

        write_page(CellStore.open(args.store), args.html, args.sections, args)
        print(f"{args.html}: {args.html.stat().st_size / 2**10:,.0f} KiB")
        return 0
    from dataclasses import asdict

    from megacell.store.format.manifest import FORMAT, VERSION, Manifest
    from megacell.store.read.duplicates import duplicates_of

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
    graphs = [
        (name, manifest.neighbours[key].cells, manifest.neighbours[key].edges) for name, key in manifest.graphs.items()
    ]
    copies = [str(pair) for pair in duplicates_of(Path(args.store), manifest)] if args.duplicates else []
    if args.json:
        facts |= {"duplicates": copies} if args.duplicates else {}
        sources = [asdict(source) for source in manifest.sources]
        facts |= {"sources": sources, "obs": [asdict(c) for c in manifest.obs]}
        facts["neighbours"] = [{"name": name, "cells": cells, "edges": edges} for name, cells, edges in graphs]
        print(json.dumps(facts, indent=1))
        return 0
    for name, value in facts.items():
        print(f"{name:<11}{value:,}" if isinstance(value, int) else f"{name:<11}{value}")
    print(f"{'obs':<11}{', '.join(f'{c.name} ({c.kind})' for c in manifest.obs)}")
    listed = [f"{name} ({edges:,} edges of {cells:,} cells)" for name, cells, edges in graphs]
    print(f"{'neighbours':<11}{', '.join(listed) or 'none'}\n")
    lines = [
        (s.name, f"{s.cells:,}", f"{s.genes:,}", s.matrix, s.kind, s.ids, "; ".join(s.notes)) for s in manifest.sources
    ]
    print(table(("source", "cells", "genes", "matrix", "counts", "ids", "notes"), lines))
    if args.duplicates:
        print("\n" + "\n".join(copies or ["no cell stands twice"]))
    return 0


def run_overlap(args: argparse.Namespace) -> int:
    """Count, by source, the cells that the other store holds."""
    from megacell.store.read.cell_store import CellStore
    from megacell.store.read.overlap import open_store_of, overlap

    found = overlap(CellStore.open(args.store), open_store_of(Path(args.other)))
    cells, held = sum(each.cells for each in found), sum(each.held for each in found)
    lines = [(each.source, f"{each.cells:,}", f"{each.held:,}") for each in found]
    print(table(("source", "cells", "held"), [*lines, ("all", f"{cells:,}", f"{held:,}")]))
    return 0


def run_verify(args: argparse.Namespace) -> int:
    """Check a store and name every damage."""
    from megacell.core.progress import Progress
    from megacell.store.format.verify import verify

    with Progress(show=True) as bar:
        found = verify(args.store, lambda total: bar.start("reading bytes", total), bar.advance)
    if not found.damages:
        print(f"{args.store}: {found.files:,} files, {found.bytes:,} bytes, all as they were written")
        return 0
    for damage in found.damages[:-1]:
        print(f"megacell verify: {damage}", file=sys.stderr)
    raise DataError(found.damages[-1] + f" ({len(found.damages)} damaged)" * (len(found.damages) > 1))
