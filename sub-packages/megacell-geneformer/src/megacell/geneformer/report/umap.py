# SPDX-License-Identifier: Apache-2.0
"""The UMAP of embedded held-out cells on a run's page."""

import warnings
from pathlib import Path
from typing import Any

import numpy as np

from megacell.core.errors import DataError, UsageError
from megacell.core.report.charts import points
from megacell.core.report.page import Page
from megacell.store import CellStore
from megacell.store.sampling.order import some_of
from megacell.store.sampling.split import Split
from megacell.store.sources.anndata_file import open_h5

MOST_CELLS = 4000
FEWEST_CELLS = 20
KEY = "X_megacell"


def umap_section(page: Page, store: CellStore, split: Split | None, embedded: Path, by: str | None) -> None:
    """Add a UMAP of the held-out cells (all of them where it is not known which are), coloured by a column of obs.

    Raises
    ------
    UsageError, DataError
        If the file holds no embeddings of this store's cells, or there is no such column.
    """
    import anndata as ad

    if not embedded.is_file():
        raise UsageError(f"--embedded {embedded}: no such file; `megacell embed RUN STORE --out {embedded}` makes it")
    if by is not None and by not in store.obs_columns:
        raise UsageError(f"--by {by}: {store.path} has no such column; it has {', '.join(store.obs_columns)}")
    with open_h5(embedded):
        pass  # no link in it leads to another file
    data = ad.read_h5ad(embedded, backed="r")
    try:
        if KEY not in data.obsm or data.n_obs != len(store):
            raise DataError(f"{embedded}: not the embeddings of {store.path}'s {len(store):,} cells; embed the store")
        embedding = np.asarray(data.obsm[KEY])
    finally:
        data.file.close()
    chosen = ~np.isnan(embedding).any(1)
    which = "all cells"
    if split is not None:
        chosen &= split.validation
        which = "held-out cells"
    cells = some_of(np.flatnonzero(chosen), MOST_CELLS, seed=0)
    page.section("Embedding")
    if len(cells) < FEWEST_CELLS:
        page.text(f"Only {len(cells)} {which} are embedded: too few for a UMAP.")
        return
    labels = np.full(len(cells), "cells")
    if by is not None:
        labels = store.obs_column(by).astype("string").fillna("(missing)").to_numpy(str)[cells]
    title = f"UMAP of {len(cells):,} {which}" + (f" by {by}" if by else "")
    page.figures({title: points(title, _umap(embedding[cells]), labels.tolist())})
    page.text(
        "Distances between far groups mean little in a UMAP; a classifier on held-out donors tells more.", note=True
    )


def _umap(embedding: np.ndarray) -> Any:
    """Return the plane's coordinates, float32 [cells, 2]; the same at every call."""
    import scanpy as sc
    from anndata import AnnData

    data = AnnData(obsm={"X": embedding.astype(np.float32)}, shape=(len(embedding), 0))
    with warnings.catch_warnings(action="ignore"):  # of umap-learn, on what it is built with
        sc.pp.neighbors(data, use_rep="X", random_state=0)
        sc.tl.umap(data, random_state=0)
    return data.obsm["X_umap"]
