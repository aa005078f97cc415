# SPDX-License-Identifier: Apache-2.0
"""A store over a matrix: any donors, sources and panels, which real files do not show, and no files."""

from collections.abc import Callable, Sequence
from hashlib import blake2b
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import scipy.sparse as sp


class StoreInMemory:
    """The part of a `CellStore` that sampling, tokens and vocabularies use.

    Parameters
    ----------
    counts : array or sparse matrix [cells, genes]
    gene_ids, symbols, biotypes : sequence of str [genes], optional
    donors, sources : sequence of str [cells], optional
    subsets, normalised : collection of str
        The sources with a selection of genes, and those with length-normalised counts.
    """

    def __init__(
        self,
        counts: Any,
        gene_ids: Sequence[str] | None = None,
        symbols: Sequence[str] | None = None,
        biotypes: Sequence[str] | None = None,
        donors: Sequence[str | None] | None = None,
        sources: Sequence[str] | None = None,
        subsets: Sequence[str] = (),
        normalised: Sequence[str] = (),
    ) -> None:
        self.matrix = sp.csr_matrix(counts, dtype=np.float32)
        self.matrix.sort_indices()
        cells, genes = self.matrix.shape
        self.path, self.generation = Path("made-up"), 1
        self.digest = blake2b(self.matrix.data.tobytes()).hexdigest()[:16]
        self.gene_ids = np.array([f"ENSG{g:011d}" for g in range(genes)] if gene_ids is None else gene_ids, object)
        self.symbols = np.array([""] * genes if symbols is None else symbols, object)
        self.biotypes = np.array([""] * genes if biotypes is None else biotypes, object)
        self.cell_hash = np.array([_hash(row) for row in self.matrix], np.uint64)
        self._set_labels(["a.h5ad"] * cells if sources is None else sources, donors)
        self._set_sources(subsets, normalised)

    def _set_labels(self, sources: Sequence[str], donors: Sequence[str | None] | None) -> None:
        self.obs = pd.DataFrame({"source": sources})
        if donors is not None:
            self.obs["donor_id"] = pd.Categorical(donors)
        self.obs_columns = list(self.obs.columns)

    def _set_sources(self, subsets: Sequence[str], normalised: Sequence[str]) -> None:
        codes, names = pd.factorize(self.obs["source"].to_numpy(object))
        self.source_of = codes.astype(np.uint32)
        kind = {True: "length-normalised", False: "umi"}
        self.sources = [
            SimpleNamespace(name=name, subset=name in subsets, kind=kind[name in normalised], hash=f"of {name}")
            for name in names
        ]

    def __len__(self) -> int:
        return self.matrix.shape[0]

    def obs_column(self, name: str) -> pd.Series:
        return self.obs[name]

    def obs_slice(self, columns: Sequence[str] | None = None, start: int = 0, stop: int | None = None) -> pd.DataFrame:
        frame = self.obs[self.obs_columns if columns is None else list(columns)].iloc[start:stop]
        return frame.set_axis(range(start, start + len(frame)))

    def gather(
        self, cells: Any, allocate: Callable[..., np.ndarray] | None = None
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return row offsets, genes and counts of cells, as `CellStore.gather` does; ``allocate`` is not used."""
        block = self.matrix[np.asarray(cells)]
        block.sort_indices()
        return block.indptr.astype(np.int64), block.indices.astype(np.uint16), block.data


def _hash(row: sp.csr_matrix) -> int:
    return int(blake2b(row.indices.tobytes() + row.data.tobytes(), digest_size=8).hexdigest(), 16)
