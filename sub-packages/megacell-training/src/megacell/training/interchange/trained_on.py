# SPDX-License-Identifier: Apache-2.0
"""The store that a model was trained on, found by what the model says of it; `megacell overlap` asks for it."""

from pathlib import Path
from typing import Any

from megacell.core.errors import DataError, UsageError
from megacell.store import CellStore
from megacell.training.foreign.plain import check_shape
from megacell.training.run.recorded import RECORD


def store_of(path: Path) -> CellStore | None:
    """Open the store of a model at the generation that it was trained on.

    Entry point of the group `megacell.store_of`.

    Parameters
    ----------
    path : Path
        .nemo file, run or checkpoint.

    Returns
    -------
    CellStore or None
        None where the path is no model that was trained here.

    Raises
    ------
    DataError
        The store is not where it was, or has not these cells any more.
    """
    record = _record(path)
    if record is None:
        return None
    where = Path(record["path"])
    mend = "give the folder of the store itself"
    if not where.exists():
        raise DataError(f"{path}: was trained on {where}, which is not there; {mend}")
    try:
        store = CellStore.open(where)
        if store.digest != record["digest"]:
            store = CellStore.open(where, record["generation"])
    except DataError as error:
        raise DataError(f"{path}: was trained on {where}, whose cells can't be opened ({error}); {mend}") from error
    if store.digest != record["digest"]:
        raise DataError(f"{path}: was trained on {where}, which holds other cells by now; {mend}")
    return store


def _record(path: Path) -> dict[str, Any] | None:
    """Return what a model says of its store."""
    from megacell.training.checkpoint import checkpoint
    from megacell.training.checkpoint.find import find_checkpoint
    from megacell.training.interchange.nemo import read_config

    if path.is_file():
        told: Any = read_config(path).get("provenance") or {}
    else:
        try:
            told = checkpoint.read_facts(find_checkpoint(path))
        except UsageError:  # nothing that was trained
            return None
    try:
        check_shape(told, {"store?": RECORD})
    except ValueError as error:
        raise DataError(f"{path}: what it says of its store cannot be: {error}; fetch it again") from None
    record: dict[str, Any] | None = told.get("store")
    return record if record and "path" in record else None
