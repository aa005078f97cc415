# SPDX-License-Identifier: Apache-2.0
"""The sub-commands convert, info and verify; each imports what is slow to import when it runs."""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from megacell.store.convert_command import register_convert, table
from megacell.store.errors import DataError


def register(commands: Any) -> None:
    """Add `convert`, `info` and `verify` to argparse's sub-parsers."""
    register_convert(commands)
    info = commands.add_parser("info", help="say what a cell store holds")
    info.add_argument("store", metavar="STORE")
    info.add_argument("--json", action="store_true", help="print it as JSON")
    info.set_defaults(run=run_info)
    verify = commands.add_parser("verify", help="check every byte of a cell store")
    verify.add_argument("store", metavar="STORE")
    verify.set_defaults(run=run_verify)


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
    print(table(("source", "cells", "genes", "matrix", "counts", "ids", "notes"), lines))
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
