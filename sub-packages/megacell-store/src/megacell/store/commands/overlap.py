# SPDX-License-Identifier: Apache-2.0
"""The sub-command overlap: cells of one store that another one, or the store of a model, holds too."""

import argparse
from pathlib import Path
from typing import Any

from megacell.core.cli.parsers import table


def register_overlap(commands: Any) -> None:
    """Add `overlap` to argparse's sub-parsers."""
    overlap = commands.add_parser("overlap", help="count the cells of a store that another one holds too")
    overlap.add_argument("store", metavar="STORE", help="the cells to look for, such as those of an evaluation")
    overlap.add_argument("other", metavar="STORE|MODEL", help="where to look for them")
    overlap.set_defaults(run=run_overlap)


def run_overlap(args: argparse.Namespace) -> int:
    """Count, by source, the cells that the other store holds."""
    from megacell.store.read.cell_store import CellStore
    from megacell.store.read.overlap import open_store_of, overlap

    sources = overlap(CellStore.open(args.store), open_store_of(Path(args.other)))
    cells, held = sum(each.cells for each in sources), sum(each.held for each in sources)
    lines = [(each.source, f"{each.cells:,}", f"{each.held:,}") for each in sources]
    print(table(("source", "cells", "held"), [*lines, ("all", f"{cells:,}", f"{held:,}")]))
    return 0
