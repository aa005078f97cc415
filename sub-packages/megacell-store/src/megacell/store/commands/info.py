# SPDX-License-Identifier: Apache-2.0
"""The sub-command info: what a store holds, as text, JSON or a page."""

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megacell.core.cli.parsers import table
from megacell.core.errors import printable

if TYPE_CHECKING:
    from megacell.store.format.manifest import Manifest


def register_info(commands: Any) -> None:
    """Add `info` to argparse's sub-parsers; other packages append to its default ``sections``."""
    info = commands.add_parser("info", help="print what a cell store holds")
    info.add_argument("store", metavar="STORE")
    info.add_argument("--duplicates", action="store_true", help="count exact copies of cells, by pair of sources")
    info.add_argument("--json", action="store_true", help="print it as JSON")
    info.add_argument("--html", type=Path, metavar="FILE", help="write it as a page with charts instead")
    info.set_defaults(run=run_info, sections=[])


def run_info(args: argparse.Namespace) -> int:
    """Print what the manifest lists, or write it as a page."""
    if args.html:
        from megacell.store.commands.info_page import write_page
        from megacell.store.read.cell_store import CellStore

        write_page(CellStore.open(args.store), args.html, args.sections, args)
        print(f"{args.html}: {args.html.stat().st_size / 2**10:,.0f} KiB")
        return 0
    from megacell.store.format.manifest import Manifest
    from megacell.store.read.duplicates import duplicates_of

    manifest = Manifest.open(Path(args.store))
    copies = [str(pair) for pair in duplicates_of(Path(args.store), manifest)] if args.duplicates else None
    if args.json:
        print(json.dumps(_to_json(args.store, manifest, copies), indent=1))
    else:
        _show(args.store, manifest, copies)
    return 0


def _totals(path: str, manifest: "Manifest") -> dict[str, Any]:
    from megacell.store.format.manifest import FORMAT, VERSION

    return {
        "path": path,
        "format": FORMAT,
        "version": VERSION,
        "generation": manifest.generation,
        "digest": manifest.digest,
        "species": manifest.species,
        "cells": manifest.cells,
        "genes": manifest.genes,
        "values": manifest.values,
        "shards": len(manifest.shards),
        "bytes": sum(record.bytes for _, record in manifest.all_files()),
    }


def _graphs(manifest: "Manifest") -> list[tuple[str, int, int]]:
    """Return name, cells and edges of each graph."""
    records = {name: manifest.neighbours[key] for name, key in manifest.graphs.items()}
    return [(name, record.cells, record.edges) for name, record in records.items()]


def _to_json(path: str, manifest: "Manifest", copies: list[str] | None) -> dict[str, Any]:
    from dataclasses import asdict

    return {
        **_totals(path, manifest),
        **({} if copies is None else {"duplicates": copies}),
        "sources": [asdict(source) for source in manifest.sources],
        "obs": [asdict(column) for column in manifest.obs],
        "neighbours": [{"name": name, "cells": cells, "edges": edges} for name, cells, edges in _graphs(manifest)],
    }


def _show(path: str, manifest: "Manifest", copies: list[str] | None) -> None:
    for name, value in _totals(path, manifest).items():
        print(f"{name:<11}{value:,}" if isinstance(value, int) else f"{name:<11}{printable(value)}")
    print(f"{'obs':<11}{', '.join(f'{printable(column.name)} ({column.kind})' for column in manifest.obs)}")
    graphs = [f"{printable(name)} ({edges:,} edges of {cells:,} cells)" for name, cells, edges in _graphs(manifest)]
    print(f"{'neighbours':<11}{', '.join(graphs) or 'none'}\n")
    lines = [
        (s.name, f"{s.cells:,}", f"{s.genes:,}", s.matrix, s.kind, s.ids, "; ".join(s.notes)) for s in manifest.sources
    ]
    print(table(("source", "cells", "genes", "matrix", "counts", "ids", "notes"), lines))
    if copies is not None:
        print("\n" + "\n".join(map(printable, copies or ["no cell is stored twice"])))
