# SPDX-License-Identifier: Apache-2.0
"""Single cells on disk: a memory-mapped, checksummed store of counts, made from .h5ad files."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megacell.store.conversion.conversion import convert
    from megacell.store.maintain.compaction import compact
    from megacell.store.read.cell_store import CellStore

__all__ = ["CellStore", "compact", "convert"]

# no module may bear an exported name: once imported, it would stand here in the function's place
_FROM = {
    "CellStore": "megacell.store.read.cell_store",
    "compact": "megacell.store.maintain.compaction",
    "convert": "megacell.store.conversion.conversion",
}


def __getattr__(name: str) -> Any:
    """Import the readers and writers when they are first used: `megacell --help` needs none of them."""
    if name not in _FROM:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_FROM[name]), name)
