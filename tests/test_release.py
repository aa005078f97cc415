# SPDX-License-Identifier: Apache-2.0
"""What a release is made of: one version, citation and forms that are valid, wheels that work where nothing else is."""

import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import yaml
from runs import here

ROOT = Path(__file__).resolve().parents[1]
VERSION = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
PARTS = ("megacell-store", "megacell-geneformer")


def fine(*words: object, **options) -> str:
    """Run a program that has to succeed; return what it printed."""
    done = subprocess.run(list(map(str, words)), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **options)
    assert done.returncode == 0, done.stdout
    return done.stdout


def test_every_file_of_the_source_has_its_line_in_the_architecture():
    told = (ROOT / "docs" / "architecture.md").read_text()
    files = {path.name for path in (ROOT / "sub-packages").glob("*/src/**/*.py")} - {"__init__.py"}
    assert len(files) > 100
    assert not [name for name in sorted(files) if f"`{name}`" not in told]


def test_the_version_stands_in_one_place():
    for part in PARTS:
        project = tomllib.loads((ROOT / "sub-packages" / part / "pyproject.toml").read_text())["project"]
        assert "version" not in project
        assert "version" in project["dynamic"]
        assert not [need for need in project["dependencies"] if need.startswith("megacell") and "=" in need]
    (newest, *_) = re.findall(r"^## \[(.*?)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert newest == VERSION
    code, out, _ = here("--version")
    assert (code, out.split()) == (0, ["megacell", VERSION])


@pytest.mark.parametrize(
    ("schema", "files"),
    [
        ("vendor.citation-file-format", ["CITATION.cff"]),
        ("vendor.github-issue-config", [".github/ISSUE_TEMPLATE/config.yml"]),
        ("vendor.github-issue-forms", [f".github/ISSUE_TEMPLATE/{name}.yml" for name in ("bug", "data", "wish")]),
    ],
    ids=["the citation", "the issues' settings", "the issues' forms"],
)
def test_a_form_is_valid(schema, files):
    found = {str(path.relative_to(ROOT)) for path in ROOT.glob(".github/ISSUE_TEMPLATE/*")} | {"CITATION.cff"}
    assert set(files) <= found
    fine(sys.executable, "-m", "check_jsonschema", "--builtin-schema", schema, *(ROOT / file for file in files))


def test_what_runs_before_a_commit_is_what_lint_runs():
    (repository,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    hooks = {hook["entry"].replace(" --force-exclude", "") for hook in repository["hooks"]}
    lint = re.search(r"^lint: setup\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(), re.MULTILINE)[1]
    commands = {line.strip().replace("$(BIN)", ".venv/bin") for line in lint.splitlines()}
    assert hooks == {command.replace(" --check", "").removesuffix(" .") for command in commands}


# the wheels, into clean environments


@pytest.fixture(scope="module")
def wheels(tmp_path_factory) -> Path:
    """A folder of all wheels and the whole's source archive, built each in an environment of its own."""
    folder = tmp_path_factory.mktemp("wheels")
    fine(sys.executable, "-m", "build", "--outdir", folder, ROOT)  # the archive, and the wheel out of the archive
    for part in PARTS:
        fine(sys.executable, "-m", "build", "--wheel", "--outdir", folder, ROOT / "sub-packages" / part)
    return folder


def contents(folder: Path, name: str) -> dict[str, str]:
    """Return the files of a wheel, with the text of its metadata."""
    with zipfile.ZipFile(folder / f"{name}-{VERSION}-py3-none-any.whl") as wheel:
        names = [each for each in wheel.namelist() if not each.endswith("/")]
        return {each: wheel.read(each).decode() if "dist-info" in each else "" for each in names}


def environment(folder: Path, *packages: object) -> Path:
    """Make a virtual environment with these packages, in the versions that the tests know; return its programs."""
    fine(sys.executable, "-m", "venv", folder)
    fine(folder / "bin/pip", "install", "--quiet", "--constraint", ROOT / "constraints.txt", *packages)
    return folder / "bin"


def write_cells(path: Path) -> Path:
    """Write 60 made-up cells of 11,000 genes."""
    draw = np.random.default_rng(0)
    counts = draw.poisson(draw.gamma(0.2, 0.5, 11_000) * draw.lognormal(0, 0.3, (60, 1))).astype(np.float32)
    ad.AnnData(counts, var=pd.DataFrame(index=[f"ENSG{i:011d}" for i in range(11_000)])).write_h5ad(path)
    return path


def alone(folder: Path) -> dict[str, str]:
    """Return an environment in which nothing of this checkout is found."""
    return {"PATH": "/usr/bin:/bin", "HOME": str(folder), "MEGACELL_CACHE": str(folder / "cache")}


def test_the_whole_holds_all_parts_and_the_options(wheels):
    whole, store, geneformer = (
        contents(wheels, name) for name in ("megacell", "megacell_store", "megacell_geneformer")
    )
    code = {name for name in (*store, *geneformer) if name.startswith("megacell/")}
    assert {name for name in whole if name.startswith("megacell/")} == code
    options = {f"megacell/geneformer/{path.relative_to(ROOT)}" for path in ROOT.glob("configs/**/*.yaml")}
    assert options
    assert options <= whole.keys() & geneformer.keys()
    assert not [name for name in code if "/tests/" in name or name == "megacell/__init__.py"]
    assert (
        f"Requires-Dist: megacell-store=={VERSION}\n" in geneformer[f"megacell_geneformer-{VERSION}.dist-info/METADATA"]
    )
    needs = whole[f"megacell-{VERSION}.dist-info/METADATA"]
    assert "Requires-Dist: megacell-" not in needs
    assert "Requires-Dist: torch<2.14,>=2.10\n" in needs
    assert (wheels / f"megacell-{VERSION}.tar.gz").is_file()


def test_the_store_alone_converts_without_torch(wheels, tmp_path):
    programs = environment(tmp_path / "venv", wheels / f"megacell_store-{VERSION}-py3-none-any.whl")
    own = {"env": alone(tmp_path), "cwd": tmp_path}
    installed = {line.split("==")[0] for line in fine(programs / "pip", "freeze", **own).splitlines()}
    assert not {"torch", "nemo-toolkit", "megatron-core", "lightning"} & installed
    fine(programs / "megacell", "convert", write_cells(tmp_path / "cells.h5ad"), "--out", "store", **own)
    assert "cells      60\n" in fine(programs / "megacell", "info", "store", **own)
    assert "as they were written" in fine(programs / "megacell", "verify", "store", **own)
    fine(programs / "megacell", "doctor", "--quick", **own)
    assert "complete" in fine(programs / "megacell", "completion", "bash", **own)
    assert "pretrain" not in fine(programs / "megacell", "--help", **own)
    assert fine(programs / "megacell", "--version", **own).split() == ["megacell", VERSION]


@pytest.mark.exhaustive
@pytest.mark.parametrize("names", [["megacell"], ["megacell_store", "megacell_geneformer"]], ids=["whole", "parts"])
def test_what_is_installed_trains(names, wheels, tmp_path):
    files = [wheels / f"{name}-{VERSION}-py3-none-any.whl" for name in names]
    programs = environment(tmp_path / "venv", *files)
    own = {"env": alone(tmp_path), "cwd": tmp_path}
    megacell = programs / "megacell"
    fine(megacell, "doctor", **own)
    fine(megacell, "convert", write_cells(tmp_path / "cells.h5ad"), "--out", "store", **own)
    fine(megacell, "vocabulary", "build", "store", "--out", "vocabulary", "--split-by", "cell", **own)
    small = ("model.layers=2", "model.hidden=32", "model.ffn=64", "model.max_length=128", "batch.cells=8", "steps=2")
    told = fine(megacell, "pretrain", "store=store", "vocabulary=vocabulary", "out=run", *small, **own)
    assert "step 2: held-out loss" in told
    fine(megacell, "export", "run", "--to", "nemo", "--out", "model.nemo", **own)
    fine(megacell, "embed", "model.nemo", "cells.h5ad", "--out", "embedded.npy", **own)
    assert np.load(tmp_path / "embedded.npy").shape == (60, 32)
