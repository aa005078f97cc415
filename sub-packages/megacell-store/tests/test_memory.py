# SPDX-License-Identifier: Apache-2.0
"""Conversion streams: its anonymous memory is bounded by a block, not by the file."""

import os
import subprocess
import sys

import anndata as ad
import pandas as pd
import pytest
import scipy.sparse as sp

CONVERT = """
import sys, threading, time
from pathlib import Path
from megacell.store import conversion
from megacell.store.sources import h5_matrix

def anonymous():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) / 1e3

h5_matrix.VALUES = 1 << 18
small, large, out = sys.argv[1:]
conversion.convert(small, out + "-small", allow_subset=True)  # compiles, and fills what allocators keep
before, peak, done = anonymous(), 0.0, False

def watch():
    global peak
    while not done:
        peak = max(peak, anonymous())
        time.sleep(0.002)

thread = threading.Thread(target=watch)
thread.start()
conversion.convert(large, out, allow_subset=True)
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
    files = [tmp_path / "small.h5ad", tmp_path / "large.h5ad", tmp_path / "store"]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    answer = subprocess.run(
        [sys.executable, "-c", CONVERT, *files], capture_output=True, text=True, env=env, check=True
    )
    assert size > 90
    assert float(answer.stdout) < 50  # megabytes
