# SPDX-License-Identifier: Apache-2.0
"""`megacell demo`: every step of the path on real cells, run as the commands that a user would type."""

import csv
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import scipy.sparse as sp

from megacell.core.cli.main import main as megacell
from megacell.core.errors import DataError, UsageError
from megacell.store import CellStore

HOLDOUT = 0.15  # of the demo's 700 cells
DROPPED = 0.05  # share of the genes that each of the demo's files lacks, another one each
SEED = 0


def demo(out: Path, *, data: Path | None, label: str, steps: int | None, tensor: int) -> None:
    """Run the whole path into ``out`` and print what came of it.

    Parameters
    ----------
    out : Path
        Folder to make.
    data : Path, optional
        A folder of .h5ad files; without it, scanpy's 700 PBMC with their counts recovered.
    label : str
        obs column of cell types, for the classifier and the plot.
    steps : int, optional
        Training steps; the demo's own number without it.
    tensor : int
        2 cuts the model over both processes; 1 gives each a copy (data parallel).
    """
    from megacell.geneformer.demo import figures as demo_figures

    if out.exists():
        raise UsageError(f"{out} exists: remove it, or choose another --out")
    out.mkdir(parents=True)
    started = time.perf_counter()
    subset = ["--allow-subset"] if data is None else []
    if data is None:
        data = write_pbmc(out / "h5ad", label)
    store, vocabulary, run, model = out / "store", out / "vocabulary", out / "run", out / "model.nemo"
    _do("convert", data, "--out", store, *subset)
    _do("vocabulary", "build", store, "--out", vocabulary, "--holdout", HOLDOUT, *subset)
    settings = [f"store={store}", f"vocabulary={vocabulary}", "experiment=demo", f"out={run}", "devices=2"]
    settings += [f"parallel.tensor={tensor}"] + ([f"steps={steps}"] if steps else [])
    _train_and_kill(settings, run)
    _check(subprocess.run(_command("pretrain", f"out={run}", "resume=true"), check=False).returncode, "pretrain")
    _do("export", run, "--to", "nemo", "--out", model)
    _do("embed", model, store, "--out", out / "embedded.h5ad")
    cells = demo_figures.Cells.of(CellStore.open(store), run, model, out / "embedded.h5ad", label)
    demo_figures.plot_loss(run, out / "loss.png")
    demo_figures.plot_umap(cells, out / "umap.png")
    demo_figures.print_table(cells, run, model, store, time.perf_counter() - started)
    print(f"\npictures: {out / 'loss.png'}, {out / 'umap.png'}\n\nthe same on your own data:\n{_OWN}")


_OWN = """\
  megacell convert YOUR_FOLDER --out cells.store
  megacell vocabulary build cells.store --out vocabulary
  megacell pretrain store=cells.store vocabulary=vocabulary model=geneformer_10m out=run devices=8 precision=bf16
  megacell evaluate run cells.store
  megacell export run --to nemo --out model.nemo
  megacell embed model.nemo YOUR_FILE.h5ad --out embedded.h5ad"""


def _command(*words: object) -> list[str]:
    text = [str(word) for word in words]
    print(f"\n$ megacell {shlex.join(text)}", flush=True)
    return [sys.executable, "-m", "megacell", *text]


def _do(*words: object) -> None:
    _check(megacell(_command(*words)[3:]), str(words[0]))


def _check(code: int, what: str) -> None:
    if code:
        raise DataError(f"`megacell {what}` ended with exit code {code}; its message stands above")


def _train_and_kill(settings: list[str], run: Path) -> None:
    """Start training and kill all of its processes without warning when half of the steps are done."""
    process = subprocess.Popen(_command("pretrain", *settings), start_new_session=True)
    try:
        while process.poll() is None and _share_done(run) < 0.5:
            time.sleep(0.2)
        if process.poll() is not None:
            raise DataError(f"`megacell pretrain` ended with exit code {process.returncode} before it was to be killed")
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)  # the ranks die with their parent
            process.wait()
    print(
        f"\n-- killed (SIGKILL) at about step {_last_step(run)}; now it goes on from its last checkpoint --", flush=True
    )


def _last_step(run: Path) -> int:
    path = run / "metrics.csv"
    if not path.exists():
        return 0
    with open(path, newline="") as file:
        rows = [row["step"] for row in csv.DictReader(file)]
    return int(rows[-1]) if rows else 0


def _share_done(run: Path) -> float:
    from megacell.training.config.settings import read_saved

    if not (step := _last_step(run)):
        return 0.0
    return step / int(read_saved(run)["steps"])


def write_pbmc(folder: Path, label: str) -> Path:
    """Write scanpy's 700 PBMC as three .h5ad files of raw counts with different gene sets and layouts.

    scanpy ships them log-normalised. The counts are recovered and proven by re-encoding (``megacell.store.recover``).
    """
    import anndata as ad
    import scanpy as sc

    from megacell.store.sources.source import open_source

    folder.mkdir(parents=True)
    pbmc = sc.datasets.pbmc68k_reduced()
    obs = pd.DataFrame({label: pbmc.obs["bulk_labels"].astype(str)}, index=pbmc.obs_names)
    shipped = folder / "shipped.h5ad"
    ad.AnnData(sp.csr_matrix(pbmc.raw.X), obs=obs, var=pd.DataFrame(index=pbmc.raw.var_names)).write_h5ad(shipped)
    with open_source(shipped, counts="recover") as source:
        counts = sp.vstack(list(source.blocks())).tocsr().astype(np.float32)
        genes = pd.DataFrame(index=pd.Index(source.gene_ids))
    shipped.unlink()
    if not np.array_equal(counts.data, np.round(counts.data)):
        raise DataError("the counts recovered from scanpy's PBMC are not whole")
    print(
        f"scanpy's PBMC: {counts.shape[0]} cells, {counts.shape[1]} genes; counts recovered from log values, all whole"
    )
    draw = np.random.default_rng(SEED)
    for number, cells in enumerate(np.array_split(draw.permutation(len(obs)), 3)):
        measured = np.sort(draw.permutation(len(genes))[: round(len(genes) * (1 - DROPPED))])
        raw = ad.AnnData(counts[cells][:, measured], obs=obs.iloc[cells], var=genes.iloc[measured])
        (_counts_in_x, _counts_in_layer, _counts_in_raw)[number](raw).write_h5ad(folder / f"pbmc_{number + 1}.h5ad")
    return folder


def _counts_in_x(raw: Any) -> Any:
    return raw


def _counts_in_layer(raw: Any) -> Any:
    raw.layers["counts"] = raw.X.copy()
    return _log_normalised(raw)


def _counts_in_raw(raw: Any) -> Any:
    raw.raw = raw.copy()
    return _log_normalised(raw)


def _log_normalised(adata: Any) -> Any:
    import scanpy as sc

    sc.pp.normalize_total(adata, target_sum=1e4)
    sc.pp.log1p(adata)
    return adata
