# SPDX-License-Identifier: Apache-2.0
"""The cells that a run was started on, found again by what its checkpoint recorded, though the store has grown."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megacell.core.errors import DataError
from megacell.geneformer.tokens.token_dataset import open_cells
from megacell.geneformer.vocabulary.vocabulary import Vocabulary


def store_record(store: Any) -> dict[str, int | str]:
    """Return what tells a store at its generation from every other, and where it lies."""
    path = str(Path(store.path).resolve())
    return {"path": path, "generation": store.generation, "digest": store.digest, "cells": len(store)}


def open_recorded(path: str | Path, vocabulary: Vocabulary, record: Mapping[str, Any]) -> tuple[Any, str | None]:
    """Open a store at the generation that was recorded.

    Parameters
    ----------
    path : str or Path
    vocabulary : Vocabulary
    record : mapping
        From `store_record`.

    Returns
    -------
    store : CellStore or TokenFolder
        With the very cells of the record.
    line : str or None
        For the log, where the store has grown.

    Raises
    ------
    DataError
        Another store, or a generation that can no longer be opened.
    """
    newest = open_cells(path, vocabulary)
    if newest.digest == record["digest"]:
        return newest, None
    cells = f"the {record['cells']:,} cells of generation {record['generation']} that the run was started on"
    mend = "give the store that holds them, or start a new run with init="
    if record["generation"] >= newest.generation:
        raise DataError(f"{path}: has not {cells}; it is another store, or a part of it: {mend}")
    try:
        store = open_cells(path, vocabulary, record["generation"])
    except DataError as error:
        raise DataError(f"{path}: {cells} can no longer be opened ({error}): {mend}") from error
    if store.digest != record["digest"]:
        raise DataError(f"{path}: has not {cells}, but others: {mend}")
    return store, (
        f"the store has grown to {len(newest):,} cells, generation {newest.generation}; the run goes on with its own "
        f"{len(store):,} of generation {store.generation}. To train on all of them, start a new run with init="
    )


def check_ranks_agree(store: Any, where: torch.device) -> None:
    """Refuse a run whose ranks have opened different generations of a store; called by all of them.

    Raises
    ------
    DataError
        The store grew while they started.
    """
    digest = torch.tensor([int(store.digest, 16) >> 1], device=where)
    low, high = digest.clone(), digest.clone()
    dist.all_reduce(low, dist.ReduceOp.MIN)
    dist.all_reduce(high, dist.ReduceOp.MAX)
    if not torch.equal(low, high):
        raise DataError(
            f"{store.path}: grew while the run was starting, so that its ranks see other cells; start again"
        )
