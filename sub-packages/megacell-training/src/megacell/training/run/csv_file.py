# SPDX-License-Identifier: Apache-2.0
"""A run's tables: a row a step, cut where the run goes on from, whole at any moment."""

import csv
import io
from collections.abc import Sequence
from pathlib import Path

from megacell.core.errors import DataError
from megacell.core.files import write_whole


def keep_rows(path: Path, columns: Sequence[str], last: int) -> None:
    """Write a table without its rows of steps after ``last``, if any; with its header only where there is none yet.

    Raises
    ------
    DataError
        A row without a step.
    """
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, columns)
    writer.writeheader()
    if path.exists():
        try:
            with open(path, newline="", encoding="utf-8") as file:
                writer.writerows(row for row in csv.DictReader(file) if row["step"] and int(row["step"]) <= last)
        except (ValueError, KeyError, TypeError, csv.Error) as error:
            raise DataError(f"{path}: holds what a run does not write there ({error}); move it away") from None
    write_whole(path, text.getvalue().encode())
