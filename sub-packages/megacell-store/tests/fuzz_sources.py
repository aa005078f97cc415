# SPDX-License-Identifier: Apache-2.0
"""Run by test_damaged_sources.py: converts damaged files, each in a forked child, and judges what became of them.

Usage: fuzz_sources.py FOLDER EVERY [FORM …]. Variant n of a form is always the same file; every EVERY-th is tried.
Prints a JSON object for each form: how many were refused, how many gave a store, and a line for each that went wrong:
a crash, a hang, another error than one line that names the file, something left behind, or a store that is neither
what AnnData (or SciPy) reads of the damaged file nor what the file was before.
"""

import contextlib
import json
import os
import re
import resource
import shutil
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import scipy.io
import scipy.sparse as sp
from damages import OF_ANY, OF_BYTES, OF_SPARSE, structural
from layouts import make_anndata, make_counts, sparse, write_loom, write_mtx, write_tenx_h5, write_zarr

from megacell.core import progress
from megacell.core.cli.main import main
from megacell.store.conversion.warm_up import prepare
from megacell.store.format.verify import verify
from megacell.store.processes import watchdog as guard
from megacell.store.read.cell_store import CellStore

CELLS, GENES, LIMIT = 40, 120, 300  # and seconds after which a child hangs, on a machine however busy
IDS = [f"ENSG{i:011d}" for i in range(GENES)]
NAME = "damaged"
OF_BYTES_EACH = 35  # damages to the bytes of each form, beside one of each kind
MOST = 2 << 20  # kilobytes of memory that a child may take


# -- the files


def cells() -> ad.AnnData:
    """Cells with metadata of several kinds."""
    data = make_anndata(make_counts(CELLS, GENES, seed=1, depth=900.0))
    data.var = pd.DataFrame(index=IDS)
    data.obs["kind"] = pd.Categorical(["a", "b", "c", None] * (CELLS // 4))
    data.obs["depth"] = np.arange(CELLS) / 7
    data.obs["batch"] = pd.array([1, 2, None, 4] * (CELLS // 4), dtype="Int64")
    data.uns["organism"] = "Homo sapiens"
    return data


def write_h5ad(path: Path, layout: str) -> None:
    data, options = cells(), {}
    counts = data.X
    if layout.startswith("csr"):
        data.X = sp.csr_matrix(counts)
    elif layout.startswith("csc"):
        data.X = sp.csc_matrix(counts.astype(np.int32))
    elif layout == "raw":
        data.raw = ad.AnnData(sp.csr_matrix(counts), obs=data.obs, var=data.var)
        data = data[:, ::3].copy()
        data.X = np.log1p(data.X / counts.sum(1, keepdims=True) * 1e4)
    elif layout == "layer":
        data.layers["counts"] = sp.csc_matrix(counts)
        data.X = np.log1p(counts / counts.sum(1, keepdims=True) * 1e4)
    if "gzip" in layout:
        options = {"compression": "gzip"}
    data.write_h5ad(path, **options)


H5AD = ("csr", "csr gzip", "csc", "csc gzip", "dense", "dense gzip", "raw", "layer")
WRITERS: dict[str, tuple[str, Callable[[Path], None]]] = {
    **{f"h5ad {layout}": ("h5ad", lambda path, own=layout: write_h5ad(path, own)) for layout in H5AD},
    "zarr 2": ("zarr", lambda path: write_zarr(path, sparse(cells(), sp.csr_matrix), 2)),
    "zarr 3": ("zarr", lambda path: write_zarr(path, sparse(cells(), sp.csc_matrix), 3)),
    "zarr dense": ("zarr", lambda path: write_zarr(path, cells(), 2)),
    "loom": ("loom", lambda path: write_loom(path, cells().X, IDS)),
    "loom chunks": ("loom", lambda path: write_loom(path, cells().X, IDS, chunk=(64, 7))),
    "10x h5": ("h5", lambda path: write_tenx_h5(path, cells().X, IDS)),
    "10x h5 2": ("h5", lambda path: write_tenx_h5(path, cells().X, IDS, version=2)),
    "mtx": ("mtx", lambda path: write_mtx(path, cells().X, IDS)),
    "mtx plain": ("mtx", lambda path: write_mtx(path, cells().X, IDS, zipped=False)),
    "h5mu": ("h5mu", lambda path: write_h5mu(path)),
}


def write_h5mu(path: Path) -> None:
    write_h5ad(path, "csr gzip")
    with h5py.File(path, "r+") as file:
        file.create_group("mod/rna")
        for name in list(file):
            if name != "mod":
                file.move(name, f"mod/rna/{name}")


def damages_of(form: str) -> list[str]:
    """Return the names of the damages that a form is given, those of its structure first."""
    if not form.startswith("h5ad"):
        return list(OF_BYTES)
    own = [*OF_ANY, *(OF_SPARSE if form.split()[1] in ("csr", "csc") else ())]
    return [*own, *OF_BYTES]


def spoil(path: Path, form: str, number: int) -> str:
    """Make variant `number` of a form's file; return what was done to it."""
    names, random = damages_of(form), np.random.default_rng([number, *form.encode()])
    of_structure = len(names) - len(OF_BYTES)
    name = names[number] if number < of_structure else list(OF_BYTES)[(number - of_structure) % len(OF_BYTES)]
    if name not in OF_BYTES:
        structural(path, name, random)
        return name
    what = name
    if path.is_dir():
        files = sorted(each for each in path.rglob("*") if each.is_file())
        path = files[int(random.integers(len(files)))]
        what += f" in {path.name}"
        if random.random() < 0.1:
            path.unlink()
            return f"no {path.name}"
    path.write_bytes(bytes(OF_BYTES[name](bytearray(path.read_bytes()), random)))
    return what


# -- what others read of them


def as_matrix(matrix: object) -> np.ndarray:
    if sp.issparse(matrix):
        matrix.check_format(full_check=True)  # SciPy walks out of its arrays where indices lie outside
        matrix = matrix.toarray()
    return np.asarray(matrix, np.float64)


def by_id(matrix: np.ndarray, ids: list[str], symbols: list[str] | None = None) -> pd.DataFrame:
    """Return counts by gene, equal genes summed; among Ensembl ids, what is none goes by its symbol."""
    named = np.array([str(i).strip() for i in ids], object)
    is_id = np.array([bool(re.match(r"ENS[A-Z]*G\d{11}(\..*)?$", i)) for i in named])
    if is_id.mean() >= 0.5:
        named = np.array([re.sub(r"^(ENS[A-Z]*\d{11})\..*$", r"\1", i, flags=re.S) for i in named], object)
        if symbols is not None:
            named = np.where(is_id, named, np.array([str(i).strip() for i in symbols], object))
    frame = pd.DataFrame(matrix, columns=named)
    return frame.loc[:, frame.columns != ""].T.groupby(level=0).sum().T


def oracle(path: Path, form: str, place: str) -> tuple[pd.DataFrame | None, pd.DataFrame | None]:
    """Return counts and obs as AnnData or SciPy reads them, each None where it fails or was not asked."""
    kind = form.split()[0]
    if kind in ("h5ad", "h5mu", "zarr"):
        import zarr

        group = zarr.open_group(str(path), mode="r") if kind == "zarr" else h5py.File(path, "r")
        group = group["mod/rna"] if kind == "h5mu" else group
        where = {"X": "X", "raw": "raw/X"}.get(place, place.replace("layer:", "layers/"))
        var = "raw/var" if place == "raw" else "var"
        counts = attempt(lambda: by_id(as_matrix(ad.io.read_elem(group[where])), ad.io.read_elem(group[var]).index))
        return counts, attempt(lambda: ad.io.read_elem(group["obs"]))
    if kind == "loom":
        with h5py.File(path, "r") as file:
            ids = [v.decode(errors="replace") for v in file["row_attrs/ensembl_id"][()]]
            return attempt(lambda: by_id(file["matrix"][()].T, ids)), None
    if kind == "10x":
        with h5py.File(path, "r") as file:
            (group,) = (file[name] for name in file if "barcodes" in file[name])
            places = ("features/id", "features/name") if "features" in group else ("genes", "gene_names")
            ids, symbols = ([v.decode(errors="replace") for v in group[place][()]] for place in places)
            parts = tuple(group[name][()] for name in ("data", "indices", "indptr"))
            rna = np.ones(len(ids), bool)
            if "features" in group:  # what is said to be something else than a gene is no gene
                rna = np.array([kind.lower() == b"gene expression" for kind in group["features/feature_type"][()]])
            own = ([name for name, is_rna in zip(names, rna, strict=True) if is_rna] for names in (ids, symbols))
            return attempt(lambda: by_id(as_matrix(sp.csr_matrix(parts, group["shape"][:][::-1]))[:, rna], *own)), None
    found = next(p for p in path.iterdir() if "matrix.mtx" in p.name)
    return attempt(lambda: by_id(as_matrix(scipy.io.mmread(found).tocsr().T.tocsr()), *names_of_mtx(path))), None


def names_of_mtx(path: Path) -> tuple[list[str], list[str]]:
    (table,) = (p for p in path.iterdir() if p.name.startswith(("features", "genes")))
    names = pd.read_csv(table, sep="\t", header=None, quoting=3, keep_default_na=False, dtype=str)
    return names[0].tolist(), names[1].tolist()


def attempt(work: Callable[[], pd.DataFrame]) -> pd.DataFrame | None:
    try:
        return work()
    except Exception:  # what a peer raises for a damaged file is its own affair
        return None


def judge(store: Path, path: Path, form: str, original: Path) -> str:
    """Say what is wrong with a store, "" if nothing is."""
    opened = CellStore.open(store)
    if damages := verify(store).damages:
        return str(damages)
    found = pd.DataFrame(opened.rows(slice(None)).toarray(), columns=list(opened.gene_ids))
    place = opened.sources[0].matrix
    tried = []
    for each in (path, original):
        counts, obs = attempt_both(each, form, place)
        if counts is None:
            tried.append(f"{each.name}: not read")
        elif set(counts.columns) != set(found.columns):
            tried.append(f"{each.name}: other genes")
        elif counts.shape != found.shape or not np.array_equal(counts[found.columns].astype(np.float32), found):
            tried.append(f"{each.name}: other counts")
        elif obs is not None and (wrong := other_obs(obs, opened.obs)):
            tried.append(f"{each.name}: {wrong}")
        else:
            return ""
    return "a wrong store: " + "; ".join(tried)


def attempt_both(path: Path, form: str, place: str) -> tuple[pd.DataFrame | None, pd.DataFrame | None]:
    try:
        return oracle(path, form, place)
    except Exception:  # as for `attempt`: a file that the peer cannot open is not judged by it
        return None, None


def other_obs(expected: pd.DataFrame, found: pd.DataFrame) -> str:
    if list(map(str, expected.index)) != list(found.index):
        return "other names of cells"
    for name in expected.columns:
        own, ours = expected[name].astype(object), found[str(name)].astype(object)
        if own.isna().tolist() != ours.isna().tolist():
            return f"other {name} missing"
        pairs = zip(own[own.notna()], ours[own.notna().to_numpy()], strict=True)
        if any(a != b and str(a) != str(b) for a, b in pairs):
            return f"other {name}"
    return ""


# -- children


def in_child(work: Callable[[], object], errors: Path) -> tuple[str, str]:
    """Run in a forked process; return how it ended ("exit 1", "signal 11", "hang") and its standard error."""
    errors.write_bytes(b"")
    child = os.fork()
    if child == 0:
        code = 99
        try:
            resource.setrlimit(resource.RLIMIT_DATA, (8 << 30, 8 << 30))
            descriptor = os.open(errors, os.O_WRONLY)
            os.dup2(descriptor, 2)
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            with contextlib.redirect_stderr(open(2, "w", closefd=False)):
                code = int(work() or 0)
                sys.stderr.flush()
        except BaseException:
            os.write(2, traceback.format_exc().encode())
        os._exit(code)
    deadline = time.monotonic() + LIMIT
    while time.monotonic() < deadline:
        done, status, usage = os.wait4(child, os.WNOHANG)
        if done and usage.ru_maxrss > MOST:
            return f"{usage.ru_maxrss >> 10} MB of memory", ""
        if done:
            how = f"signal {os.WTERMSIG(status)}" if os.WIFSIGNALED(status) else f"exit {os.WEXITSTATUS(status)}"
            return how, errors.read_text(errors="replace")
        time.sleep(0.002)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return "hang", ""


def say(text: str) -> int:
    os.write(2, text.encode())
    return 0


def one(folder: Path, form: str, number: int, counts: dict[str, int]) -> str:
    """Make one variant, convert and judge it; return what went wrong."""
    suffix = WRITERS[form][0]
    original, path, store = folder / f"{form}.{suffix}", folder / f"{NAME}.{suffix}", folder / "store"
    for left in (path, store):
        shutil.rmtree(left) if left.is_dir() else left.unlink(missing_ok=True)
    shutil.copytree(original, path) if original.is_dir() else shutil.copy(original, path)
    what = spoil(path, form, number)
    command = ["convert", str(path), "--out", str(store), "--allow-subset", "--allow-low-counts"]
    how, errors = in_child(lambda: main(command), folder / "errors")
    where = f"{form}, variant {number}, {what}: "
    if how == "exit 1" or (how == "exit 2" and "no source in this folder" in errors):  # its matrix is what made it one
        counts["refused"] += 1
        if len(errors.strip().splitlines()) != 1 or f"{NAME}." not in errors:
            return f"{where}not one line that names the file: {errors[-600:]}"
        return f"{where}left a folder" if store.exists() else ""
    if how != "exit 0":
        counts[how] = counts.get(how, 0) + 1
        return f"{where}{how} {errors[-1500:]}"
    counts["stores"] += 1
    how, answer = in_child(lambda: say(judge(store, path, form, original)), folder / "errors")
    return f"{where}{how if how != 'exit 0' else ''} {answer[-1500:]}" if answer or how != "exit 0" else ""


def run(folder: Path, form: str, every: int) -> dict[str, object]:
    """Judge every so many-th variant of a form."""
    suffix, write = WRITERS[form]
    original = folder / f"{form}.{suffix}"
    how, errors = in_child(lambda: write(original), folder / "errors")  # Zarr starts threads, which no fork survives
    assert how == "exit 0", errors
    counts = {"refused": 0, "stores": 0}
    last = len(damages_of(form)) + OF_BYTES_EACH
    wrong = [line for number in range(0, last, every) if (line := one(folder, form, number, counts))]
    return {**counts, "wrong": wrong}


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    guard.SECONDS = 3.0
    progress.EVERY = float("inf")  # on a busy machine even a small file would be worth a line
    prepare()  # what is compiled here, no child compiles again
    place, step = Path(sys.argv[1]), int(sys.argv[2])
    for each in sys.argv[3:] or WRITERS:
        print(json.dumps({"form": each, **run(place, each, step)}), flush=True)
