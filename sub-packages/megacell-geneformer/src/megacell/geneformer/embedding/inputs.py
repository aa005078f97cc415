# SPDX-License-Identifier: Apache-2.0
"""What cells are embedded from: an AnnData in memory, a file of any format that `convert` reads, or a store."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import scipy.sparse as sp

from megacell.core.errors import DataError
from megacell.store import CellStore
from megacell.store.format.manifest import NAME as MANIFEST
from megacell.store.sources.source import CellSource, open_source

if TYPE_CHECKING:
    from anndata import AnnData

LEAST_GENES = 10_000  # a file that measures fewer is a selection of genes
ROWS_AT_ONCE = 2048


@dataclass
class CellInput:
    """Cells in order.

    Attributes
    ----------
    place : str
        The file's name, for messages.
    gene_ids, symbols : object str [genes]
        What the columns of counts are.
    obs : DataFrame [cells]
        Index kept.
    """

    place: str
    gene_ids: Any
    symbols: Any
    obs: pd.DataFrame
    source: CellSource | CellStore

    def __len__(self) -> int:
        return len(self.obs)

    def rows(self, start: int, stop: int) -> Iterator[sp.csr_matrix]:
        """Yield the counts of a range of cells, at most `ROWS_AT_ONCE` at a time."""
        if isinstance(self.source, CellStore):
            for first in range(start, stop, ROWS_AT_ONCE):
                yield self.source.rows(np.arange(first, min(first + ROWS_AT_ONCE, stop)))
        else:
            yield from self.source.blocks(ROWS_AT_ONCE, start, stop)


@contextmanager
def open_input(
    data: "AnnData | Path | CellStore", counts: str = "auto", gene_ids: str = "auto", *, allow_subset: bool = False
) -> Iterator[CellInput]:
    """Open cells by the rules of `megacell convert`: counts are found and proven, genes told by their ids.

    Parameters
    ----------
    data : AnnData, Path or CellStore
        An AnnData goes through a temporary file, so that the same rules hold for it.
    counts, gene_ids : str
        As for `convert`.
    allow_subset : bool
        Take cells of which under 10,000 genes were measured.

    Raises
    ------
    DataError, UsageError
        As `open_source`; or a selection of genes.
    """
    if isinstance(data, CellStore):
        yield CellInput(str(data.path), data.gene_ids, data.symbols, data.obs, data)
    elif isinstance(data, Path):
        if (data / MANIFEST).exists():
            with open_input(CellStore.open(data)) as cells:
                yield cells
            return
        with open_source(data, counts, gene_ids) as source:
            if len(source.gene_ids) < LEAST_GENES and not allow_subset:
                raise DataError(
                    f"{data}: measures {len(source.gene_ids):,} genes, a selection: ranks and totals differ from those "
                    "of whole cells; give the file with all genes, or --allow-subset"
                )
            yield CellInput(str(data), source.gene_ids, source.symbols, source.obs(), source)
    else:
        with tempfile.TemporaryDirectory(prefix="megacell-") as folder:
            path = Path(folder) / "AnnData.h5ad"
            _plain(data).write_h5ad(path)
            with open_input(path, counts, gene_ids, allow_subset=allow_subset) as cells:
                cells.place = "the AnnData"
                yield cells


def _plain(adata: "AnnData") -> "AnnData":
    """Return what `open_source` looks at: matrices and genes, and the cells' metadata."""
    from anndata import AnnData

    raw = adata.raw.to_adata() if adata.raw is not None else None
    plain = AnnData(adata.X, obs=adata.obs, var=adata.var, layers=dict(adata.layers))
    if raw is not None:
        plain.raw = AnnData(raw.X, obs=plain.obs[[]], var=raw.var)
    return plain
