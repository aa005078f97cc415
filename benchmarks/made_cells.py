# SPDX-License-Identifier: Apache-2.0
"""Made cells for benchmarks: gamma-Poisson counts whose genes and totals spread as in real data."""

from pathlib import Path
from typing import Any

import anndata
import numba
import numpy as np
import pandas as pd
import scipy.sparse as sp

CELLS, GENES, VALUES_A_CELL = 50_000, 20_000, 1_490
SPREAD_OF_GENES, SPREAD_OF_TOTALS = 2.5, 0.4  # standard deviations of logarithms
SHAPE = 2.0  # of the gamma distribution: a gene's counts vary by mean + mean² / SHAPE
AT_ONCE = 1_000  # cells drawn in one go

Array = np.ndarray[Any, Any]


@numba.njit(cache=True)
def _draw(rng: Any, totals: Any, shares: Any, indptr: Any, genes: Any, counts: Any) -> int:
    """Draw cells gene by gene, by the inverse of the counts' distribution function; return how many values."""
    n = 0
    for cell in range(len(totals)):
        for gene in range(len(shares)):
            mean = totals[cell] * shares[gene]
            share = SHAPE / (SHAPE + mean)
            term = share * share  # of no count; SHAPE is 2
            left = rng.random() - term
            if left < 0:
                continue
            count = 0
            while left >= 0 and term > 1e-12:
                term *= (count + SHAPE) / (count + 1) * (1 - share)
                count += 1
                left -= term
            genes[n], counts[n] = gene, count
            n += 1
        indptr[cell + 1] = n
    return n


def _depth(shares: Array, totals: Array, values_a_cell: float) -> float:
    """Return by what totals have to be multiplied for so many values a cell on average."""
    some, low, high = np.quantile(totals, np.linspace(0.0025, 0.9975, 200)), 1.0, 1e6
    for _ in range(30):
        depth = (low * high) ** 0.5
        values = np.mean([(1 - (SHAPE / (SHAPE + depth * total * shares)) ** 2).sum() for total in some])
        low, high = (depth, high) if values < values_a_cell else (low, depth)
    return depth


def draw_cells(
    cells: int = CELLS, genes: int = GENES, values_a_cell: float = VALUES_A_CELL, dtype: str = "float32", seed: int = 0
) -> sp.csr_matrix:
    """Return made cells' counts: CSR [cells, genes] of a type, sorted, without zeros."""
    rng = np.random.default_rng(seed)
    shares = rng.lognormal(0, SPREAD_OF_GENES, genes)
    shares /= shares.sum()
    totals = rng.lognormal(0, SPREAD_OF_TOTALS, cells)
    totals *= _depth(shares, totals, values_a_cell)
    parts = []
    for first in range(0, cells, AT_ONCE):
        own = totals[first : first + AT_ONCE]
        indptr = np.zeros(len(own) + 1, np.int64)
        columns, counts = np.empty(len(own) * genes, np.int32), np.empty(len(own) * genes, dtype)
        n = _draw(rng, own, shares, indptr, columns, counts)
        parts.append(sp.csr_matrix((counts[:n].copy(), columns[:n].copy(), indptr), (len(own), genes)))
    return sp.vstack(parts, format="csr", dtype=dtype)


def write_cells(path: Path, counts: sp.csr_matrix, first: int = 0, compression: str | None = None) -> None:
    """Write counts to an .h5ad file, with names of cells from number `first` on, cell types and Ensembl-like ids."""
    names = pd.Index([f"cell-{i}" for i in range(first, first + counts.shape[0])], dtype=object)
    types = pd.Categorical([f"type {i % 7}" for i in range(counts.shape[0])])
    var = pd.DataFrame({"feature_name": [f"GENE{i}" for i in range(counts.shape[1])]})
    var.index = pd.Index([f"ENSG{i:011d}" for i in range(counts.shape[1])], dtype=object)
    obs = pd.DataFrame({"cell_type": types}, index=names)
    anndata.AnnData(counts, obs=obs, var=var).write_h5ad(path, compression=compression)
