# SPDX-License-Identifier: Apache-2.0
"""What the store's tests share: real cells, made ones, and files of every layout."""

import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import anndata as ad
import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent))  # layouts.py and damages.py, also in processes that tests start

from graph_files import with_graphs
from layouts import make_anndata, make_counts

from megacell.store import CellStore


@pytest.fixture(scope="session")
def real_cells(data: Path) -> Path:
    """The folder of real .h5ad files."""
    return data / "cells"


@pytest.fixture
def save(tmp_path: Path) -> Callable[..., Path]:
    """A function that writes AnnData (or counts) to a file of the test's folder."""

    def write(data: Any, name: str = "made.h5ad", **options: Any) -> Path:
        data = data if isinstance(data, ad.AnnData) else make_anndata(data, **options)
        path = tmp_path / name
        data.write_h5ad(path)
        return path

    return write


@pytest.fixture
def files(save: Callable[..., Path]) -> list[Path]:
    """Three files with graphs, each a shard and more."""
    return [save(with_graphs(60 + i, i), f"f{i}.h5ad") for i in range(3)]


@pytest.fixture
def counts() -> np.ndarray:
    """60 cells x 300 genes with totals like real ones, and counts that do not fit a byte."""
    counts = make_counts(60, 300, depth=800.0)
    counts[5, 7], counts[6, 8], counts[7, 9] = 255, 777, 70_000
    return counts


def all_counts(store: CellStore, gene_ids: Any) -> np.ndarray:
    """All counts of a store, in the order of `gene_ids`: float32 [cells, genes]."""
    number = {gene: i for i, gene in enumerate(store.gene_ids)}
    columns = [number[gene] for gene in gene_ids]
    return store.rows(np.arange(len(store))).toarray()[:, columns]


@pytest.fixture(scope="session")
def made() -> SimpleNamespace:
    """The functions above, for tests: `made.counts`, `made.anndata`, `made.all_counts`."""
    return SimpleNamespace(counts=make_counts, anndata=make_anndata, all_counts=all_counts)
