# SPDX-License-Identifier: Apache-2.0
"""However its processes are started, a run is the same run."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest

from megacell.store.cli import main as megacell
from ranks import free_port

GENES, CELLS, WAIT = 12_000, 120, 240


@pytest.fixture(scope="module")
def settings(tmp_path_factory) -> list[str]:
    """A small made-up store, its vocabulary, and the settings of a short run over them."""
    folder = tmp_path_factory.mktemp("launch")
    draw = np.random.default_rng(0)
    rates, depths = draw.gamma(0.1, 0.5, size=GENES), draw.lognormal(sigma=0.5, size=(CELLS, 1))
    counts = draw.poisson(rates * depths).astype(np.float32)
    names = pd.DataFrame(index=[f"ENSG{i:011d}" for i in range(GENES)])
    ad.AnnData(counts, var=names, obs=pd.DataFrame(index=[f"cell{i}" for i in range(CELLS)])).write_h5ad(
        folder / "cells.h5ad"
    )
    assert megacell(["convert", str(folder / "cells.h5ad"), "--out", str(folder / "store")]) == 0
    assert megacell(["vocabulary", "build", str(folder / "store"), "--out", str(folder / "vocabulary")]) == 0
    tiny = ["model.layers=1", "model.hidden=32", "model.ffn=64", "model.max_length=256"]
    short = ["steps=3", "batch.cells=8", "batch.tokens=1024", "log_every=1", "checkpoint.every=3", "validation.every=3"]
    return [f"store={folder / 'store'}", f"vocabulary={folder / 'vocabulary'}", *tiny, *short]


def losses(run: Path) -> list[float]:
    """Return the training losses of a run."""
    with open(run / "metrics.csv", newline="") as file:
        return [float(row["loss"]) for row in csv.DictReader(file)]


def finish(processes: list[subprocess.Popen]) -> None:
    """Wait for processes that must all end well."""
    for process in processes:
        output, _ = process.communicate(timeout=WAIT)
        assert process.returncode == 0, output


def start(command: list[str], **environment: str) -> subprocess.Popen:
    """Start one process with what it needs in its environment."""
    own = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.Popen(command, env=own, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def by_devices(pretrain: list[str]) -> list[subprocess.Popen]:
    return [start([sys.executable, "-m", *pretrain, "devices=2"])]


def by_torchrun_on_two_nodes(pretrain: list[str]) -> list[subprocess.Popen]:
    port = free_port()
    return [
        start([sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--node-rank", str(node),
               "--nproc-per-node", "1", "--rdzv-backend", "c10d", "--rdzv-id", "test",
               "--rdzv-endpoint", f"127.0.0.1:{port}", "-m", *pretrain])
        for node in range(2)
    ]  # fmt: skip


def by_srun(pretrain: list[str]) -> list[subprocess.Popen]:
    job = {
        "SLURM_NTASKS": "2",
        "SLURM_NTASKS_PER_NODE": "2",
        "SLURM_NNODES": "1",
        "SLURM_NODEID": "0",
        "SLURM_JOB_ID": str(10_000 + free_port()),  # Lightning makes the port of it
        "SLURM_JOB_NAME": "train",
        "SLURM_NODELIST": "127.0.0.1",
    }
    return [
        start([sys.executable, "-m", *pretrain], **job, SLURM_PROCID=str(rank), SLURM_LOCALID=str(rank))
        for rank in range(2)
    ]


@pytest.fixture(scope="module")
def reference(settings, tmp_path_factory) -> list[float]:
    """Losses of two ranks that `devices=2` started."""
    run = tmp_path_factory.mktemp("reference") / "run"
    finish(by_devices(["megacell.store.cli", "pretrain", *settings, f"out={run}"]))
    return losses(run)


@pytest.mark.parametrize("way", [by_torchrun_on_two_nodes, by_srun])
def test_every_way_to_start_two_ranks_gives_the_same_losses(way, settings, reference, tmp_path):
    run = tmp_path / "run"
    finish(way(["megacell.store.cli", "pretrain", *settings, f"out={run}"]))
    assert len(reference) == 3
    assert losses(run) == reference
