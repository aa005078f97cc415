# SPDX-License-Identifier: Apache-2.0
"""The name by which other packages open a user's file; it takes every format that `open_source` does."""

from megacell.store.sources.source import CellSource, NotWhole, open_source

__all__ = ["CellSource", "NotWhole", "open_h5ad"]

open_h5ad = open_source
