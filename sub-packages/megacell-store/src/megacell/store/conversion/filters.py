# SPDX-License-Identifier: Apache-2.0
"""Which cells are kept: primary ones, those that passed a file's own filter, those that a query names."""

import numpy as np

from megacell.store.conversion.options import Options
from megacell.store.read.query import Array, matching
from megacell.store.sources.source import CellSource

_FALSE = ("false", "0", "0.0")


def kept_cells(source: CellSource, options: Options) -> tuple[Array, list[str]]:
    """Return bool [cells], the cells to keep, and notes on those that are not; counts are not looked at here."""
    keep, notes = np.ones(source.n_cells, bool), []
    for column in ("is_primary_data", "filter_pass"):
        if column in source.obs_columns and not options.all_cells:
            own = source.obs(names=[column])[column]
            false = own.astype(object).astype(str).str.strip().str.lower().isin(_FALSE)
            skipped = keep & np.asarray(false)
            keep &= ~skipped
            if n := int(skipped.sum()):
                notes.append(f"{n:,} cells with {column} == False skipped")
    if options.where is not None:
        chosen = matching(options.where, source.obs_columns, lambda names: source.obs(names=names), str(source.path))
        if n := int((keep & ~chosen).sum()):
            notes.append(f"{n:,} cells skipped that are not: {options.where}")
        keep &= chosen
    return keep, notes
