# SPDX-License-Identifier: Apache-2.0
"""Which cells a query over their metadata names."""

import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pandas as pd

from megacell.core.errors import UsageError
from megacell.store.sources.container import ROW_NAMES

Array = np.ndarray[Any, Any]
_NAME = re.compile(r"`([^`]+)`|([^\W\d]\w*)")
_TEXT = re.compile(r"'[^']*'|\"[^\"]*\"")


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
