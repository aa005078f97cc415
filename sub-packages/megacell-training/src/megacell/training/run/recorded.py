# SPDX-License-Identifier: Apache-2.0
"""The cells that a run was started on, found again by what its checkpoint recorded, though the store has grown."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
import torch.distributed as dist

from megacell.core.errors import DataError

RECORD = {"path?": str, "generation": int, "digest": str, "cells": int}  # of a store: the types of a `store_record`


class Recordable(Protocol):
    """Cells on disk: a `CellStore`, or what a family made of one."""

    path: Path
    generation: int
    digest: str

    def __len__(self) -> int: ...


Cells = TypeVar("Cells", bound=Recordable)


def store_record(store: Recordable) -> dict[str, int | str]:
    """Return what tells a store at its generation from every other, and where it lies."""
    path = str(Path(store.path).resolve())
    return {"path": path, "generation": store.generation, "digest": store.digest, "cells": len(store)}


def open_recorded(
    path: str | Path, record: Mapping[str, Any], open_cells: Callable[[str | Path, int | None], Cells]
) -> tuple[Cells, str | None]:
    """Open a store at the generation that was recorded.

    Parameters
    ----------
    path : str or Path
    record : mapping
        From `store_record`.
    open_cells : callable
        Opens a path at a generation; None for the newest.

    Returns
    -------
    store
        With the very cells of the record.
    line : str or None
        For the log, where the store has grown.

    Raises
    ------
    DataError
        Another store, or a generation that can no longer be opened.
    """
    newest = open_cells(path, None)
    if newest.digest == record["digest"]:
        return newest, None
    cells = f"the {record['cells']:,} cells of generation {record['generation']} that the run was started on"
    mend = "give the store that holds them, or start a new run with init="
    if record["generation"] >= newest.generation:
        raise DataError(f"{path}: has not {cells}; it is another store, or a part of it: {mend}")
    try:
        store = open_cells(path, record["generation"])
    except DataError as error:
        raise DataError(f"{path}: {cells} can no longer be opened ({error}): {mend}") from error
    if store.digest != record["digest"]:
        raise DataError(f"{path}: has not {cells}, but others: {mend}")
    return store, (
        f"the store has grown to {len(newest):,} cells, generation {newest.generation}; the run goes on with its own "
        f"{len(store):,} of generation {store.generation}. To train on all of them, start a new run with init="
    )


def check_ranks_agree(digest: str, name: str, where: torch.device) -> None:
    """Refuse a run whose ranks have opened different data; called by all of them.

    Parameters
    ----------
    digest : str
        Hexadecimal, of the data as this rank sees them.
    name : str
        The data's, for the message.
    where : torch.device

    Raises
    ------
    DataError
        They grew while the ranks started.
    """
    number = torch.tensor([int(digest, 16) >> 1], device=where)
    low, high = number.clone(), number.clone()
    dist.all_reduce(low, dist.ReduceOp.MIN)
    dist.all_reduce(high, dist.ReduceOp.MAX)
    if not torch.equal(low, high):
        raise DataError(f"{name}: grew while the run was starting, so that its ranks see other cells; start again")
