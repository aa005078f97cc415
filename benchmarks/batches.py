# SPDX-License-Identifier: Apache-2.0
"""`megacell bench batches` on a store of real-like cells, larger than a processor's cache.

    python benchmarks/batches.py CELLS GENEFORMER [--cells 20000] [--seconds 5] [--json results.json]

CELLS: .h5ad files or folders of them. GENEFORMER: a folder with V2's dictionaries. Each cell is drawn from Poisson
distributions about the mean of two real ones, scaled so that a cell has 1,343 genes on average.
"""

import argparse
import json
import tempfile
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import scipy.sparse as sp

from megacell.geneformer.bench import bench_batches, table
from megacell.geneformer.geneformer_pickles import import_geneformer
from megacell.store import CellStore, convert

GENES_A_CELL = 1343
CELLS_AT_ONCE = 500


def _draw(counts: sp.csr_matrix, scale: float, cells: int, rng: np.random.Generator) -> sp.csr_matrix:
    one, other = (counts[rng.integers(0, counts.shape[0], cells)] for _ in range(2))
    mean = (one + other).tocsr()
    mean.data = rng.poisson(mean.data * (scale / 2)).astype(np.float32)
    mean.eliminate_zeros()
    return mean


def real_like(store: CellStore, cells: int, path: Path) -> None:
    """Write ``cells`` cells like those of a store to an .h5ad file."""
    counts, rng = store.rows(np.arange(len(store))), np.random.default_rng(0)
    low, high = 0.05, 20.0
    for _ in range(12):  # more counts a cell, more genes
        scale = (low * high) ** 0.5
        few = _draw(counts, scale, CELLS_AT_ONCE, rng).nnz / CELLS_AT_ONCE < GENES_A_CELL
        low, high = (scale, high) if few else (low, scale)
    matrix = sp.vstack([_draw(counts, scale, CELLS_AT_ONCE, rng) for _ in range(-(-cells // CELLS_AT_ONCE))]).tocsr()
    var = pd.DataFrame({"feature_name": store.symbols}, index=pd.Index(store.gene_ids, dtype=object).astype(str))
    anndata.AnnData(matrix, var=var).write_h5ad(path)


def main() -> None:
    """Make the cells, convert, import, measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sources", type=Path, nargs="+", metavar="CELLS")
    parser.add_argument("geneformer", type=Path, metavar="GENEFORMER")
    parser.add_argument("--cells", type=int, default=20_000, help="to make (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=5.0, help="a measurement (default: %(default)s)")
    parser.add_argument("--json", type=Path, help="write the figures here too")
    args = parser.parse_args()
    dictionaries = [
        next(args.geneformer.glob(f"{name}*.pkl")) for name in ("token_dictionary", "gene_median_dictionary")
    ]
    with tempfile.TemporaryDirectory() as folder:
        convert(args.sources, Path(folder) / "real")
        real_like(CellStore.open(Path(folder) / "real"), args.cells, Path(folder) / "cells.h5ad")
        convert([Path(folder) / "cells.h5ad"], Path(folder) / "store")
        figures = bench_batches(CellStore.open(Path(folder) / "store"), import_geneformer(*dictionaries), args.seconds)
    print(table(figures))
    if args.json:
        text = {"command": "python benchmarks/batches.py CELLS GENEFORMER --cells " + str(args.cells), **figures}
        args.json.write_text(json.dumps(text, indent=1) + "\n")


if __name__ == "__main__":
    main()
