# SPDX-License-Identifier: Apache-2.0
"""One writer a store: the lock in its folder."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megacell.core import lock
from megacell.core.lock import is_held as is_held

NAME = lock.NAME


@contextmanager
def writing(store: Path, name: str = NAME) -> Iterator[None]:
    """Hold the store's lock, or another of that name; one whose process ended is taken over.

    Raises
    ------
    DataError
        Another process, or one of another machine that cannot be asked, is writing.
    """
    with lock.held(store / name, f"{store}: another conversion is writing here"):
        yield
