# SPDX-License-Identifier: Apache-2.0
"""Bad input is one line that names place and fix, with the exit code of its kind, and leaves nothing half written."""

import contextlib
import resource
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from runs import TINY, Command, everything_in, here, one_line

DATA, USAGE = 1, 2
GENES = 12_000  # a whole panel; fewer would be a selection


def counts(cells: int = 40, genes: int = GENES) -> np.ndarray:
    """Counts whose genes and totals spread as real ones do, about 2,000 a cell: float32 [cells, genes]."""
    draw = np.random.default_rng(0)
    rates, depths = draw.gamma(0.1, 1.0, size=genes), draw.lognormal(sigma=0.5, size=(cells, 1))
    return draw.poisson(rates / rates.sum() * depths * 2_000).astype(np.float32)


def write(path: Path, matrix: np.ndarray, **changes) -> Path:
    """Write counts as an .h5ad file with Ensembl ids."""
    var = pd.DataFrame(index=[f"ENSG{i:011d}" for i in range(matrix.shape[1])])
    cells = ad.AnnData(sp.csr_matrix(matrix), var=var, obs=pd.DataFrame(index=[f"cell{i}" for i in range(len(matrix))]))
    for name, value in changes.items():
        setattr(cells, name, value)
    cells.write_h5ad(path)
    return path


# files that are refused


def text(path):
    path.write_text("cell,gene,count\n")


def empty(path):
    path.touch()


def truncated(path):
    whole = write(path, counts()).read_bytes()
    path.write_bytes(whole[: len(whole) // 2])


def no_anndata(path):
    with h5py.File(path, "w") as file:
        file["numbers"] = np.arange(9)


def without_cells(path):
    write(path, np.zeros((0, GENES), np.float32))


def all_zero(path):
    write(path, np.zeros((30, GENES), np.float32))


def negative(path):
    matrix = counts()
    matrix[20, 5] = -1
    write(path, matrix)


def not_a_number(path):
    matrix = counts()
    matrix[20, 5] = np.nan
    write(path, matrix)


def scaled(path):
    matrix = counts()
    write(path, (matrix - matrix.mean(0)) / (matrix.std(0) + 1))


def cp10k(path):
    matrix = counts()
    write(path, matrix / matrix.sum(1, keepdims=True) * 10_000)


def rounded_cp10k(path):
    matrix = counts()
    write(path, np.round(matrix / matrix.sum(1, keepdims=True) * 10_000))


def logarithms(path):
    matrix = counts()
    write(path, np.log1p(matrix / matrix.sum(1, keepdims=True) * 10_000))


def tpm(path):
    matrix = counts() / np.random.default_rng(1).uniform(0.5, 5, GENES)
    write(path, matrix / matrix.sum(1, keepdims=True) * 1e6)


def mouse_symbols(path):
    known = ["Gapdh", "Actb", "Cd3e", "Cd4", "Cd8a", "Ms4a1", "Nkg7", "Lyz2", "Malat1", "Ptprc"]
    write(path, counts(), var_names=[*known, *(f"Gene{i}a" for i in range(GENES - len(known)))])


def mouse_ids(path):
    write(path, counts(), var_names=[f"ENSMUSG{i:011d}" for i in range(GENES)])


def numbered_genes(path):
    write(path, counts(), var_names=[str(i) for i in range(GENES)])


def few_genes(path):
    write(path, counts(genes=2_000))


@dataclass(frozen=True)
class File:
    """A file that is refused: what makes it, and what the line says of the reason and of the fix."""

    make: Callable[[Path], object]
    says: tuple[str, ...]


FILES = {
    "no HDF5 file": File(text, ("not an HDF5 file", "fetch it again")),
    "an empty file": File(empty, ("is empty", "fetch it again")),
    "a truncated file": File(truncated, ("truncated", "fetch it again")),
    "an HDF5 file that is no AnnData": File(no_anndata, ("no .h5ad file", "AnnData")),
    "no cells": File(without_cells, ("0 cells", "leave it out")),
    "no counts anywhere": File(all_zero, ("no values above zero", "give one that does")),
    "a negative value": File(negative, ("negative", "give one that does")),
    "a NaN": File(not_a_number, ("NaN", "give one that does")),
    "scaled values": File(scaled, ("negative", "give one that does")),
    "near-constant totals": File(cp10k, ("normalised", "give one that does")),
    "near-constant totals, rounded": File(rounded_cp10k, ("near-constant totals", "give one that does")),
    "logarithms": File(logarithms, ("log", "--counts")),
    "totals of a million": File(tpm, ("TPM", "--allow-length-normalised")),
    "mouse symbols": File(mouse_symbols, ("mouse", "species")),
    "mouse ids": File(mouse_ids, ("mouse", "species")),
    "numbers for genes": File(numbered_genes, ("gene", "--gene-ids")),
    "a selection of genes": File(few_genes, ("2,000 genes", "--allow-subset")),
}


@pytest.fixture
def refuses(tmp_path, monkeypatch):
    """A function that runs a command and asserts that it is refused in one line, with nothing written."""
    monkeypatch.chdir(tmp_path)

    def check(code: int, says: tuple[str, ...], *words: object, process: bool = False) -> None:
        before = everything_in(tmp_path), sorted(tmp_path.rglob("*"))
        got, out, err = Command(*words).end() if process else here(*words)
        assert got == code, f"exit code {got}\n{out}\n{err}"
        assert "Traceback" not in err
        one_line(err, "error: ", *says)
        assert (everything_in(tmp_path), sorted(tmp_path.rglob("*"))) == before

    return check


@pytest.mark.parametrize("file", FILES.values(), ids=FILES.keys())
def test_convert_refuses_a_file_with(file, refuses, tmp_path):
    file.make(tmp_path / "bad.h5ad")
    refuses(DATA, ("bad.h5ad", *file.says), "convert", tmp_path / "bad.h5ad", "--out", tmp_path / "store")


@pytest.mark.parametrize("name", ["a truncated file", "near-constant totals, rounded", "a NaN"])
def test_one_bad_file_among_good_ones_leaves_no_store(name, refuses, tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    write(folder / "a.h5ad", counts())
    FILES[name].make(folder / "bad.h5ad")
    refuses(DATA, ("bad.h5ad", *FILES[name].says), "convert", folder, "--out", tmp_path / "store")


def test_a_dry_run_says_the_verdict_of_each_file_and_writes_nothing(tmp_path):
    write(tmp_path / "good.h5ad", counts())
    rounded_cp10k(tmp_path / "bad.h5ad")
    code, out, err = here("convert", tmp_path, "--out", tmp_path / "store", "--dry-run")
    assert code == DATA
    verdicts = {line.split()[0]: line for line in out.splitlines()}
    assert "near-constant totals" in verdicts["bad.h5ad"]
    assert "good" in verdicts["good.h5ad"].removeprefix("good.h5ad")
    assert "Traceback" not in err
    assert not (tmp_path / "store").exists()


# arguments


USED_WRONGLY = {
    "no command": ((), ("COMMAND",)),
    "an unknown command": (("konvert",), ("konvert",)),
    "an unknown option of convert": (("convert", "a.h5ad", "--out", "s", "--bogus"), ("--bogus",)),
    "an unknown option of embed": (("embed", "m", "d", "--out", "o.npy", "--bogus"), ("--bogus",)),
    "no output": (("convert", "a.h5ad"), ("--out",)),
    "a source that is not there": (("convert", "absent.h5ad", "--out", "s"), ("absent.h5ad", "no such")),
    "another export format": (("export", "r", "--to", "onnx", "--out", "o"), ("onnx", "nemo")),
    "an unknown pool": (("embed", "m", "d", "--out", "o.npy", "--pool", "max"), ("max", "mean", "cls")),
}


@pytest.mark.parametrize(("words", "says"), USED_WRONGLY.values(), ids=USED_WRONGLY.keys())
def test_wrong_usage_is_exit_code_2_with(words, says, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, _, err = here(*words)
    assert code == USAGE
    assert "Traceback" not in err
    *usage, line = err.strip().splitlines()  # argparse shows the usage first
    assert not usage or usage[0].startswith("usage: megacell")
    assert "error: " in line
    for part in says:
        assert part in line
    assert not list(tmp_path.iterdir())


PRETRAIN = {
    "no store": ((), ("store=", "must be given")),
    "a store that is not there": (("store=absent", "vocabulary={vocabulary}"), ("store=absent", "no such folder")),
    "a vocabulary that is not there": (("store={store}", "vocabulary=absent"), ("vocabulary=absent", "no such folder")),
    "an unknown option": (("{both}", "bogus=1"), ("bogus", "--cfg")),
    "an unknown option of a group": (("{both}", "optim.bogus=1"), ("bogus", "--cfg")),
    "an unknown model": (("{both}", "model=huge"), ("huge", "tiny", "geneformer_10m")),
    "an option without a value": (("{both}", "steps"), ("steps",)),
    "no steps": (("{both}", "steps=0"), ("steps=0", "at least 1")),
    "an unknown precision": (("{both}", "precision=fp8"), ("fp8", "fp32", "bf16")),
    "tensor parallel ranks that do not divide the heads": (
        ("{both}", "parallel.tensor=3", "devices=3"), ("parallel.tensor=3", "heads (4)", "choose another"),
    ),
    "heads that do not divide the width": (("{both}", "model.hidden=30"), ("model.hidden=30", "model.heads=4")),
    "ranks that tensor parallel does not divide": (
        ("{both}", "parallel.tensor=2", "devices=3"), ("parallel.tensor=2", "3 rank", "devices=2"),
    ),
    "fewer ranks than tensor parallel": (("{both}", "parallel.tensor=2"), ("parallel.tensor=2", "1 rank", "devices=2")),
    "fewer cells in a step than ranks": (("{both}", "devices=2", "batch.cells=1"), ("batch.cells=1", "raise it")),
    "packs that hold no cell": (("{both}", "batch.tokens=100"), ("batch.tokens=100", "max_length")),
    "pipeline parallelism": (
        ("{both}", "parallel.pipeline=2", "devices=2"), ("parallel.pipeline=2", "not offered", "parallel.tensor"),
    ),
    "context parallelism": (
        ("{both}", "parallel.context=2", "devices=2"), ("parallel.context=2", "not offered", "parallel.sequence"),
    ),
    "an unknown way to recompute": (("{both}", "parallel.recompute=some"), ("recompute=some", "selective, full")),
    "an unknown attention": (("{both}", "attention=fast"), ("attention=fast", "flash", "transformer_engine")),
    "an attention that cannot run in float32": (
        ("{both}", "attention=transformer_engine"), ("attention=transformer_engine", "attention=auto"),
    ),
    "compiling that is neither on nor off": (("{both}", "compile=some"), ("compile=some", "true or false")),
    "a switch that is neither on nor off": (("{both}", "parallel.sequence=2"), ("sequence=2", "true or false")),
    "an unknown place of the norms": (("{both}", "model.norm=middle"), ("model.norm=middle", "pre, post")),
    "an unknown activation": (("{both}", "model.activation=silu"), ("model.activation=silu", "gelu, relu")),
    "a schedule without a decay": (
        ("{both}", "steps=100", "optim.warmup=0.5", "optim.hold=50"), ("warmup=0.5", "hold=50", "steps=100"),
    ),
    "no loss scale": (("{both}", "optim.initial_loss_scale=0"), ("initial_loss_scale=0", "at least 1")),
    "an experiment without what was not published": (
        ("{both}", "experiment=geneformer_v2_38m"), ("steps=", "must be given"),
    ),
    "an unknown order of cells": (("{both}", "data.order=random"), ("data.order=random", "shuffled, blocks")),
    "balance and blocks at once": (
        ("{both}", "data.order=blocks", "data.balance=cell_type"), ("data.balance=cell_type", "data.order=blocks"),
    ),
    "a share of masks above one": (("{both}", "data.masking.rate=2"), ("rate is 2", "0 to 1")),
    "nothing to resume": (("{both}", "resume=true"), ("no run to resume", "resume=true")),
}  # fmt: skip


@pytest.fixture(scope="module")
def inputs(store, vocabulary):
    """What stands for {store}, {vocabulary} and {both} in a table."""
    both = (f"store={store}", f"vocabulary={vocabulary}", *TINY)
    return lambda words: [
        filled
        for word in words
        for filled in (both if word == "{both}" else [word.format(store=store, vocabulary=vocabulary)])
    ]


@pytest.mark.parametrize(("words", "says"), PRETRAIN.values(), ids=PRETRAIN.keys())
def test_pretrain_refuses(words, says, inputs, refuses, tmp_path):
    refuses(USAGE, says, "pretrain", *inputs(words), f"out={tmp_path / 'run'}")


def test_pretrain_refuses_to_compile_without_a_compiler(inputs, refuses, tmp_path, monkeypatch):
    for name in ("CC", "CXX"):  # a GPU's kernels need the one, a CPU's the other
        monkeypatch.setenv(name, str(tmp_path / "absent"))
    words = (*inputs(["{both}"]), "compile=true", f"out={tmp_path / 'run'}")
    refuses(USAGE, ("compile=true", "install it, or leave compile=true out"), "pretrain", *words)
    assert not (tmp_path / "run").exists()


def test_pretrain_refuses_a_run_folder_that_holds_something(inputs, refuses, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes.txt").write_text("mine")
    refuses(USAGE, ("run exists", "resume=true", "out="), "pretrain", *inputs(["{both}"]), f"out={tmp_path / 'run'}")


def test_pretrain_refuses_weights_of_another_vocabulary_before_a_run_folder_is_made(copies, store, refuses, tmp_path):
    other = tmp_path / "other"
    assert here("vocabulary", "build", store, "--out", other, "--split-by", "cell", "--min-cells", "100")[0] == 0
    words = [f"store={store}", f"vocabulary={other}", *TINY, f"init={copies[0]}", "steps=2", f"out={tmp_path / 'run'}"]
    refuses(DATA, (str(copies[0]), "another vocabulary"), "pretrain", *words, process=True)


# commands on models


MODELS = {
    "an output of export that exists": (USAGE, ("export", "{run}", "--to", "nemo", "--out", "{there}"), ("exists",)),
    "an output of embed that exists": (USAGE, ("embed", "{run}", "{cells}", "--out", "{there}"), ("exists",)),
    "an output that is no table or file of cells": (
        USAGE, ("embed", "{run}", "{cells}", "--out", "out.csv"), ("out.csv", ".h5ad", ".parquet"),
    ),
    "a model that is not there": (USAGE, ("embed", "absent", "{cells}", "--out", "o.npy"), ("absent", "no such")),
    "cells that are not there": (USAGE, ("embed", "{run}", "absent.h5ad", "--out", "o.npy"), ("absent", "no such")),
    "a layer beyond the last": (
        USAGE, ("embed", "{run}", "{real}", "--out", "o.npy", "--layer", "3"), ("--layer 3", "1 to 2"),
    ),
    "layer 0": (USAGE, ("embed", "{run}", "{real}", "--out", "o.npy", "--layer", "0"), ("--layer 0", "1 to 2")),
    "a layer that is none": (
        USAGE, ("embed", "{run}", "{real}", "--out", "o.npy", "--layer", "top"), ("--layer top", "last"),
    ),
    "a folder that is no run": (USAGE, ("export", "{folder}", "--to", "nemo", "--out", "o.nemo"), ("neither", "run")),
    "a run without a checkpoint": (
        DATA, ("export", "{begun}", "--to", "nemo", "--out", "o.nemo"), ("no whole checkpoint",),
    ),
    "a file that is no .nemo": (DATA, ("embed", "{cells}", "{cells}", "--out", "o.npy"), ("not a .nemo", "cells.h5ad")),
    "a column that the store has not": (
        USAGE, ("evaluate", "{run}", "{store}", "--by", "colour"), ("--by colour", "cell_type", "donor_id"),
    ),
    "no cells to evaluate": (USAGE, ("evaluate", "{run}", "{store}", "--cells", "0"), ("--cells 0", "1")),
    "a store that is none": (DATA, ("evaluate", "{run}", "{folder}"), ("convert",)),
    "cells of a foreign species": (
        DATA, ("embed", "{run}", "{mouse}", "--out", "o.npy"), ("mouse.h5ad", "vocabulary"),
    ),
    "normalised cells": (
        DATA, ("embed", "{run}", "{normalised}", "--out", "o.npy"), ("normalised.h5ad", "give one that does"),
    ),
    "a selection of genes": (
        DATA, ("embed", "{run}", "{selection}", "--out", "o.h5ad"), ("selection.h5ad", "2,000 genes", "--allow-subset"),
    ),
    "a vocabulary that exists": (USAGE, ("vocabulary", "build", "{store}", "--out", "{folder}"), ("exists", "--out")),
    "a store that exists": (USAGE, ("convert", "{cells}", "--out", "{store}"), ("exists", "--append")),
}  # fmt: skip


@pytest.fixture
def things(copies, store, data, tmp_path):
    """What stands for the words in braces."""
    folder, begun = tmp_path / "folder", tmp_path / "begun"
    folder.mkdir()
    (folder / "notes.txt").write_text("no run")
    (begun / "checkpoints").mkdir(parents=True)
    (tmp_path / "there.h5ad").write_bytes(b"mine")
    makers = {"cells": lambda path: write(path, counts(25)), "mouse": mouse_ids, "normalised": rounded_cp10k,
              "selection": few_genes}  # fmt: skip
    files = {name: tmp_path / f"{name}.h5ad" for name in makers}

    def fill(words):
        for word in words:
            if (name := word.strip("{}")) in makers:
                makers[name](files[name])
        known = {"run": copies[0], "store": store, "folder": folder, "begun": begun, "there": tmp_path / "there.h5ad",
                 "real": data / "cells" / "pbmc5k_protein.h5ad"}  # fmt: skip
        return [word.format(**known, **files) for word in words]

    return fill


@pytest.mark.parametrize(("code", "words", "says"), MODELS.values(), ids=MODELS.keys())
def test_the_commands_of_a_trained_model_refuse(code, words, says, things, refuses):
    refuses(code, says, *things(words))


@contextlib.contextmanager
def full_disk(limit: int):
    """No file grows over ``limit`` bytes inside: each write beyond it fails as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("suffix", [".h5ad", ".npy", ".parquet"])
def test_a_full_disk_leaves_no_half_embedding(suffix, copies, store, refuses, tmp_path):
    with full_disk(50_000):
        refuses(DATA, ("File too large",), "embed", copies[0], store, "--out", tmp_path / f"out{suffix}")


def test_a_full_disk_leaves_no_half_nemo_file(copies, refuses, tmp_path):
    with full_disk(50_000):
        refuses(DATA, ("out.nemo", "make room"), "export", copies[0], "--to", "nemo", "--out", tmp_path / "out.nemo")


def test_debug_shows_the_traceback_of_an_error(tmp_path):
    empty(tmp_path / "bad.h5ad")
    code, _, err = here("--debug", "convert", tmp_path / "bad.h5ad", "--out", tmp_path / "store")
    assert code == DATA
    assert "Traceback" in err


def test_a_run_that_lost_its_vocabulary_is_refused_by_name(copies, refuses, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(copies[0], run)
    shutil.rmtree(run / "vocabulary")
    words = ("export", run, "--to", "nemo", "--out", tmp_path / "out.nemo")
    refuses(DATA, (str(run / "vocabulary"), "not a vocabulary"), *words)
