# SPDX-License-Identifier: Apache-2.0
"""The sub-command bench, which every package adds its own measurements to, and bench read."""

import argparse
import json
from pathlib import Path
from typing import Any

from megacell.core.cli.parsers import bench_actions


def register_bench(commands: Any) -> None:
    """Add `bench read`."""
    read = bench_actions(commands).add_parser("read", help="random cells from a store, beside NumPy and SciPy")
    read.add_argument("store", type=Path, metavar="STORE")
    read.add_argument("--seconds", type=float, default=5.0, help="of each measurement (default: %(default)s)")
    read.add_argument("--json", action="store_true", help="print it as JSON")
    read.set_defaults(run=run_read)


def run_read(args: argparse.Namespace) -> int:
    """Measure, and print each method beside its ratio to plain NumPy."""
    from megacell.core.cli.parsers import table
    from megacell.store.commands.bench_read import bench_read
    from megacell.store.read.cell_store import CellStore

    figures = bench_read(CellStore.open(args.store), args.seconds)
    if args.json:
        print(json.dumps(figures, indent=1))
        return 0
    numpy = figures["numpy slices of the same maps"]["rows_per_cpu_second"]
    lines = [
        (
            name,
            f"{each['rows_per_second']:,.0f}",
            f"{(rate := each['rows_per_cpu_second']):,.0f}",
            f"{rate / numpy:.2f}",
        )
        for name, each in figures.items()
        if isinstance(each, dict)
    ]
    print(f"{figures['cells']:,} cells, {figures['values_per_cell']:,.0f} values a cell; random batches of 64 as CSR")
    print(table(("method", "rows/s", "rows/CPU-s", "of numpy"), lines))
    return 0
