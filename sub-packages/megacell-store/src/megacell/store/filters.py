# SPDX-License-Identifier: Apache-2.0
"""Which cells are kept: primary ones, those that passed a file's own filter, those that a query names."""

import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pandas as pd

from megacell.store.errors import UsageError
from megacell.store.options import Options
from megacell.store.sources.container import ROW_NAMES
from megacell.store.sources.source import CellSource

Array = np.ndarray[Any, Any]
_FALSE = ("false", "0", "0.0")
_NAME = re.compile(r"`([^`]+)`|([^\W\d]\w*)")
_TEXT = re.compile(r"'[^']*'|\"[^\"]*\"")


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


def matching(query: str, columns: Sequence[str], read: Callable[[list[str]], pd.DataFrame], where: str) -> Array:
    """Return which cells a query over their metadata names, in pandas' words: bool [cells].

    Parameters
    ----------
    query : str
        As for DataFrame.query, such as ``cell_type == "B" and age > 50``.
    columns : sequence of str
        Names that there are.
    read : callable
        Returns the frame of the columns that the query names, and of no others; "index" names the cells' own names.
    where : str
        For messages.

    Raises
    ------
    UsageError
        A query that cannot be evaluated, or is no condition.
    """
    known = f"columns are {', '.join(columns)}" if columns else "there is no column"
    if "@" in _TEXT.sub("", query) or "__" in query:
        raise UsageError(f"{where}: the query {query!r} may only name columns; {known}")
    named = {quoted or plain for quoted, plain in _NAME.findall(_TEXT.sub("", query))}
    frame = read([column for column in (*columns, ROW_NAMES) if column in named])
    try:
        found = np.asarray(frame.eval(query, engine="python"))
    except Exception as error:  # whatever pandas says of a query that is wrong
        line = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UsageError(f"{where}: the query {query!r} fails ({line}); {known}") from None
    if found.shape != (len(frame),) or pd.api.types.infer_dtype(found, skipna=True) not in ("boolean", "empty"):
        raise UsageError(f"{where}: the query {query!r} is no condition on cells; compare a column with something")
    return np.asarray(pd.Series(found).fillna(value=False), bool)
