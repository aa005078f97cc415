# SPDX-License-Identifier: Apache-2.0
"""A folder in which the pages' commands run: real cells, and what is made of them, under the names of the pages."""

import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import anndata as ad
import h5py
import numpy as np
import scipy.sparse as sp

SHORT = (
    "steps=4", "batch.cells=8", "validation.cells=24", "validation.every=2", "checkpoint.every=2",
    "data.baseline_cells=64",
    "model.layers=2", "model.hidden=32", "model.ffn=64", "model.heads=4", "model.max_length=256",
)  # fmt: skip
SHORTER: dict[str, tuple[str, ...]] = {  # what is added to a command, so that it takes seconds
    "evaluate": ("--cells", "20"),
    "demo": ("--steps", "120"),  # it is killed half way, after its first checkpoint
    "bench read": ("--seconds", "0.2"),
    "bench batches": ("--seconds", "0.2"),
    "bench train": ("--references", "none", "--warmup", "1", "--steps", "2", "--windows", "1", "--batches", "2"),
    "bench embed": ("--cells", "8", "--rounds", "1"),
}
TOKENIZERS = ("token_dictionary", "gene_median_dictionary", "ensembl_mapping_dict", "gene_name_id_dict")


def shell(text: str, folder: Path, timeout: int = 400) -> tuple[int, str, str]:
    """Run a line of bash in a folder, with this interpreter's programs; return exit code, stdout and stderr."""
    paths = os.pathsep.join(path for path in sys.path if path)
    programs = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = {**os.environ, "PATH": programs, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        ["bash", "-c", text], cwd=folder, env=environment, capture_output=True, text=True, timeout=timeout
    )
    return done.returncode, done.stdout, done.stderr


def fine(text: str, folder: Path) -> str:
    """Run a line that has to succeed; return what it printed."""
    code, out, err = shell(text, folder)
    assert code == 0, f"{text}\nexit code {code}\n{out}\n{err}"
    return out


def shortened(words: list[str]) -> list[str]:
    """Return what to add to a command so that it does the same in little time."""
    if words[0] == "pretrain":
        return [] if "--cfg" in words else ["steps=6"] if "resume=true" in words else list(SHORT)
    name = " ".join(words[: 2 if words[0] == "bench" else 1])
    return [*(SHORT[1:2] + SHORT[5:] if name == "bench train" else ()), *SHORTER.get(name, ())]


def clear_the_way(words: list[str], folder: Path) -> None:
    """Remove what a command is about to make anew, of this ground or of a page's earlier command."""
    if {"--append", "--finish", "--part", "resume=true"} & set(words):
        return
    given = [word.removeprefix("out=") for word in words if word.startswith("out=")]
    given += [words[place + 1] for place, word in enumerate(words) if word == "--out"]
    for name in given:
        path = folder / name
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def lay_out(folder: Path, data: Path) -> None:
    """Make files, stores, vocabularies and a model under the names that the pages use."""
    shutil.copytree(data / "cells", folder / "cells")
    whole = ad.read_h5ad(data / "cells" / "pbmc4k_a.h5ad")
    for name, make in FILES.items():
        (folder / name).parent.mkdir(exist_ok=True)
        make(whole, folder / name)
    for edition, suffix in (("V1", "gc30M"), ("V2", "gc104M")):
        for name in TOKENIZERS:
            shutil.copy(data / "geneformer" / edition / f"{name}_{suffix}.pkl", folder)
    (folder / "evil.pkl").write_bytes(pickle.dumps(Evil()))
    sheet = "path,counts,gene_ids,donor_id,tissue\nlabs/lab1.zarr,X,index,D1,blood\n"
    (folder / "lab1.csv").write_text(sheet)
    more = "labs/lab2.h5ad,auto,auto,D2,blood\nlabs/lab3_filtered_feature_bc_matrix.h5,auto,auto,D1,blood\n"
    (folder / "samples.csv").write_text(sheet + more)
    fine("megacell convert cells --out cells.store", folder)
    fine("megacell convert cells/pbmc4k_a.h5ad --out grown.store", folder)
    fine("megacell convert more.h5ad --out grown.store --append", folder)
    fine("megacell vocabulary build cells.store --out vocabulary", folder)
    for edition, suffix in (("v1", "gc30M"), ("v2", "gc104M")):
        given = f"--tokens {TOKENIZERS[0]}_{suffix}.pkl --medians {TOKENIZERS[1]}_{suffix}.pkl"
        fine(f"megacell vocabulary import {given} --out geneformer-{edition}", folder)
    fine(f"megacell pretrain store=cells.store vocabulary=vocabulary out=run {' '.join(SHORT)}", folder)
    fine("megacell export run --to nemo --out model.nemo", folder)


class Evil:
    """Runs a program when it is unpickled."""

    def __reduce__(self):
        return os.system, ("true",)


def _write(cells: slice, change: Callable[[ad.AnnData], None] | None = None) -> Callable[[ad.AnnData, Path], None]:
    def write(whole: ad.AnnData, path: Path) -> None:
        part = whole[cells].copy()
        if change:
            change(part)
        part.write_zarr(path) if path.suffix == ".zarr" else part.write_h5ad(path)

    return write


def _logarithms(cells: ad.AnnData) -> None:
    totals = np.asarray(cells.X.sum(1)).ravel()
    cells.X = sp.csr_matrix(cells.X.multiply(1e4 / totals[:, None])).log1p().astype(np.float32)


def _of_mice(cells: ad.AnnData) -> None:
    cells.var_names = cells.var_names.str.replace("ENSG", "ENSMUSG")
    cells.var = cells.var[[]]


def _with_a_graph(cells: ad.AnnData) -> None:
    cells.obsp["connectivities"] = sp.random(cells.n_obs, cells.n_obs, 0.01, "csr", np.float32, 0)


def _write_10x(whole: ad.AnnData, path: Path) -> None:
    part = whole[600:1100]
    with h5py.File(path, "w") as file:
        matrix, columns = file.create_group("matrix"), sp.csr_matrix(part.X)  # cells are 10x's columns
        for name in ("data", "indices", "indptr"):
            matrix[name] = getattr(columns, name).astype(np.int64)
        matrix["shape"] = np.array([part.n_vars, part.n_obs])
        matrix["barcodes"] = part.obs_names.to_numpy(bytes)
        matrix["features/id"] = part.var_names.to_numpy(bytes)
        matrix["features/name"] = part.var["feature_name"].astype(str).to_numpy(bytes)
        matrix["features/feature_type"] = np.full(part.n_vars, b"Gene Expression")


def _of_another_lab(whole: ad.AnnData, path: Path) -> None:
    shutil.copy(path.parents[1] / "cells" / "pbmc5k_protein.h5ad", path)


FILES = {  # by name: what writes it, of the 1,100 cells of pbmc4k_a
    "cells.h5ad": _write(slice(0, 200)),
    "again.h5ad": _write(slice(0, 200)),
    "more.h5ad": _write(slice(200, 500)),
    "log.h5ad": _write(slice(0, 300), _logarithms),
    "mouse.h5ad": _write(slice(0, 300), _of_mice),
    "pbmc.h5ad": _write(slice(0, 1100), _with_a_graph),
    "labs/lab1.zarr": _write(slice(0, 600)),
    "labs/lab2.h5ad": _of_another_lab,
    "labs/lab3_filtered_feature_bc_matrix.h5": _write_10x,
}
