# SPDX-License-Identifier: Apache-2.0
"""`megacell bench batches` on a store of real-like cells, larger than a processor's cache.

    python benchmarks/batches.py CELLS GENEFORMER [--cells 20000] [--seconds 5] [--tokenizer-python PYTHON] [--json F]

CELLS: .h5ad files or folders of them. GENEFORMER: a folder with V2's dictionaries. Each cell is drawn from Poisson
distributions about the mean of two real ones, scaled so that a cell has 1,343 genes on average. With PYTHON, which has
helical's copy of Geneformer's tokenizer (benchmarks/README.md), the same cells go through that too.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas as pd
import scipy.sparse as sp
from dictionaries import dictionary_paths, published_vocabulary
from measuring import child

from megacell.geneformer import Vocabulary
from megacell.geneformer.bench.batches import bench_batches, table
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
    ids = pd.Index(store.gene_ids, dtype=object).astype(str)
    var = pd.DataFrame({"feature_name": store.symbols, "ensembl_id": ids}, index=ids)
    anndata.AnnData(matrix, var=var).write_h5ad(path)


def against_tokenizer(python: Path, folder: Path, vocabulary: Vocabulary, geneformer: Path) -> dict[str, Any]:
    """Rank the cells of ``folder/cells.h5ad`` and of ``folder/store`` by Geneformer's tokenizer and by Megacell.

    Each runs in a process of its own, once: both take long enough. The tokenizer ranks cells that are in memory,
    Megacell those of the store. Compared are CPU seconds of that alone, and of all from file or store to a dataset.
    """
    vocabulary.save(folder / "vocabulary")
    (folder / "ours").mkdir()
    ours = child(
        sys.executable, "run_megacell.py", "tokenize", folder / "store", folder / "vocabulary", folder / "ours"
    )
    own, figures = np.load(folder / "ours" / "tokens.npz"), dict[str, Any]()
    paths = dictionary_paths(geneformer)
    for dtype in ("float64", "float32"):
        out = folder / dtype
        out.mkdir()
        theirs = child(python, "run_geneformer.py", folder / "cells.h5ad", "V2", *paths, "-", out, dtype)
        found = np.load(out / "tokens.npz")
        if not np.array_equal(found["lengths"], own["lengths"]):
            raise SystemExit("Geneformer's tokenizer and Megacell make cells of other lengths; nothing to compare")
        cell = np.repeat(np.arange(len(own["lengths"])), own["lengths"])
        figures[dtype] = {**theirs, "cells_in_another_order": len(np.unique(cell[found["tokens"] != own["tokens"]]))}
    peer = figures["float32"]
    whole = sum(peer[part]["cpu_seconds"] for part in ("loading", "ranking", "saving"))
    return {
        "megacell": ours,
        **figures,
        "times_its_speed_ranking": peer["ranking"]["cpu_seconds"] / ours["ranking"]["cpu_seconds"],
        "times_its_speed_to_a_dataset": whole / ours["writing"]["cpu_seconds"],
    }


def main() -> None:
    """Make the cells, convert, import, measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sources", type=Path, nargs="+", metavar="CELLS")
    parser.add_argument("geneformer", type=Path, metavar="GENEFORMER")
    parser.add_argument("--cells", type=int, default=20_000, help="to make (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=5.0, help="a measurement (default: %(default)s)")
    parser.add_argument("--tokenizer-python", type=Path, metavar="PYTHON", help="an interpreter that has helical")
    parser.add_argument("--json", type=Path, help="write the figures here too")
    args = parser.parse_args()
    vocabulary = published_vocabulary(args.geneformer)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        convert(args.sources, folder / "real")
        real_like(CellStore.open(folder / "real"), args.cells, folder / "cells.h5ad")
        convert([folder / "cells.h5ad"], folder / "store")
        figures = bench_batches(CellStore.open(folder / "store"), vocabulary, args.seconds)
        if args.tokenizer_python:
            against = against_tokenizer(args.tokenizer_python, folder, vocabulary, args.geneformer)
            figures = {**figures, "against_geneformers_tokenizer": against, "not_measured": []}
    print(table(figures))
    if args.tokenizer_python:
        print(f"{against['times_its_speed_ranking']:.1f} times Geneformer's tokenizer ranking, ", end="")
        print(f"{against['times_its_speed_to_a_dataset']:.1f} times to a dataset; ", end="")
        print(
            f"{against['megacell']['anonymous_mib']:,.0f} MiB against {against['float32']['anonymous_mib']:,.0f}; ",
            end="",
        )
        orders = [f"{against[dtype]['cells_in_another_order']} in {dtype}" for dtype in ("float64", "float32")]
        print(f"cells that it orders otherwise: {', '.join(orders)}")
    if args.json:
        command = f"python benchmarks/batches.py CELLS GENEFORMER --cells {args.cells} --seconds {args.seconds:g}"
        text = {"command": command + " --tokenizer-python PYTHON" * bool(args.tokenizer_python), **figures}
        args.json.write_text(json.dumps(text, indent=1) + "\n")


if __name__ == "__main__":
    main()
