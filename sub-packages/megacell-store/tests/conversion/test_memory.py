# SPDX-License-Identifier: Apache-2.0
"""Conversion streams: its anonymous memory is bounded by a block, not by the file."""

import os
import subprocess
import sys
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

CONVERT = """
import sys, threading, time
from pathlib import Path
from megacell.store import convert
from megacell.store.format import blocks
from megacell.store.sources import layouts

def anonymous():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) / 1e3

blocks.VALUES = layouts.VALUES = 1 << 18
small, large, out, *graphs = sys.argv[1:]
options = {"allow_subset": True, "neighbours": graphs}
convert(small, out + "-small", **options)  # compiles, and fills what allocators keep
before, peak, done = anonymous(), 0.0, False

def watch():
    global peak
    while not done:
        peak = max(peak, anonymous())
        time.sleep(0.002)

thread = threading.Thread(target=watch)
thread.start()
convert(large, out, **options)
done = True
thread.join()
print(peak - before)
"""


@pytest.mark.parametrize("layout", ["csr", "csc", "dense"])
def test_memory_is_bounded_by_a_block_and_not_by_the_file(layout, made, tmp_path):
    counts = made.counts(1000, 4000, depth=6000.0)
    matrix = sp.vstack([sp.csr_matrix(counts)] * 10, format="csr")
    matrix = {"csr": matrix.tocsr, "csc": matrix.tocsc, "dense": matrix.toarray}[layout]()
    size = (matrix.nbytes if layout == "dense" else matrix.data.nbytes + matrix.indices.nbytes) / 1e6
    var = pd.DataFrame(index=[f"ENSG{i:011d}" for i in range(4000)])
    ad.AnnData(matrix, var=var).write_h5ad(tmp_path / "large.h5ad")
    ad.AnnData(matrix[:900], var=var).write_h5ad(tmp_path / "small.h5ad")
    assert size > 90
    assert measured(tmp_path) < 50  # megabytes


def measured(folder: Path, *graphs: str) -> float:
    """Megabytes that a conversion of large.h5ad took beyond what one of small.h5ad had."""
    files = [folder / "small.h5ad", folder / "large.h5ad", folder / "store"]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    command = [sys.executable, "-c", CONVERT, *files, *graphs]
    return float(subprocess.run(command, capture_output=True, text=True, env=env, check=True).stdout)


@pytest.mark.parametrize("layout", ["csr", pytest.param("csc", marks=pytest.mark.exhaustive)])
def test_memory_is_bounded_by_a_block_and_not_by_a_graph(layout, made, tmp_path):
    random, cells, each = np.random.default_rng(0), 20_000, 800
    indices = random.integers(0, cells, cells * each, dtype=np.int32)
    weights, indptr = random.random(cells * each, np.float32), np.arange(cells + 1) * each
    graph = sp.csr_matrix((weights, indices, indptr), (cells, cells)).asformat(layout)
    counts = sp.vstack([sp.csr_matrix(made.counts(1000, 200))] * 20, format="csr")
    data = ad.AnnData(counts, var=pd.DataFrame(index=[f"ENSG{i:011d}" for i in range(200)]))
    data.obsp["knn"] = graph
    data.write_h5ad(tmp_path / "large.h5ad")
    data[:900].copy().write_h5ad(tmp_path / "small.h5ad")
    assert (graph.data.nbytes + graph.indices.nbytes) / 1e6 > 120
    assert measured(tmp_path, "knn") < 75  # megabytes
