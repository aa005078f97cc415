# SPDX-License-Identifier: Apache-2.0
"""What a release is made of: one version, citation and forms that are valid, wheels that work where nothing else is."""

import importlib.util
import re
import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from importlib.metadata import Distribution, PathDistribution
from pathlib import Path
from types import SimpleNamespace

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import yaml
from doors import PACKAGES
from runs import here

ROOT = Path(__file__).resolve().parents[1]
VERSION = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
PARTS = [f"megacell-{package}" for package in PACKAGES]
WITH_OPTIONS = ("training", "geneformer")  # packages that have a folder of options


def fine(*words: object, **options) -> str:
    """Run a program that has to succeed; return what it printed."""
    done = subprocess.run(list(map(str, words)), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **options)
    assert done.returncode == 0, done.stdout
    return done.stdout


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
        (
            "vendor.github-issue-forms",
            [f".github/ISSUE_TEMPLATE/{name}.yml" for name in ("bug", "data", "feature_request")],
        ),
        ("vendor.github-workflows", [".github/workflows/tests.yml"]),
        ("vendor.dependabot", [".github/dependabot.yml"]),
    ],
    ids=["the citation", "the issues' settings", "the issues' forms", "the workflow", "dependabot"],
)
def test_a_form_is_valid(schema, files):
    found = {str(path.relative_to(ROOT)) for path in ROOT.glob(".github/**/*.yml")} | {"CITATION.cff"}
    assert set(files) <= found
    fine(sys.executable, "-m", "check_jsonschema", "--builtin-schema", schema, *(ROOT / file for file in files))


def test_what_runs_before_a_commit_is_what_lint_runs():
    (repository,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    hooks = {hook["entry"].replace(" --force-exclude", "") for hook in repository["hooks"]}
    lint = re.search(r"^lint: setup\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(), re.MULTILINE)[1]
    commands = {line.strip().replace("$(BIN)", ".venv/bin") for line in lint.splitlines()}
    assert hooks == {command.replace(" --check", "").removesuffix(" .") for command in commands}


def hatch_build():
    """Return hatch_build.py as a module; hatchling, which it is a plugin of, is there only while a wheel is built."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "hatchling.metadata.plugin.interface", SimpleNamespace(MetadataHookInterface=object))
        spec = importlib.util.spec_from_file_location("hatch_build", ROOT / "hatch_build.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return module


# the wheels, into clean environments


@pytest.fixture(scope="module")
def wheels(tmp_path_factory) -> Path:
    """A folder of all wheels and the whole's source archive, built each in an environment of its own."""
    folder = tmp_path_factory.mktemp("wheels")
    fine(sys.executable, "-m", "build", "--outdir", folder, ROOT)  # the archive, and the wheel out of the archive
    for part in PARTS:
        fine(sys.executable, "-m", "build", "--wheel", "--outdir", folder, ROOT / "sub-packages" / part)
    return folder


def wheel_of(folder: Path, name: str) -> Path:
    """Return the path of a wheel, by its distribution's name."""
    return folder / f"{name.replace('-', '_')}-{VERSION}-py3-none-any.whl"


def contents(folder: Path, name: str) -> set[str]:
    """Return the files of a wheel, without its metadata."""
    with zipfile.ZipFile(wheel_of(folder, name)) as wheel:
        return {each for each in wheel.namelist() if not each.endswith("/") and ".dist-info/" not in each}


def metadata(folder: Path, name: str) -> Distribution:
    """Return what a wheel says of itself: what it requires, its extras and its entry points."""
    info = f"{name.replace('-', '_')}-{VERSION}.dist-info"
    return PathDistribution(zipfile.Path(wheel_of(folder, name), f"{info}/"))


def environment(folder: Path, *packages: object) -> Path:
    """Make a virtual environment with these packages, in the versions that the tests know; return its programs."""
    fine(sys.executable, "-m", "venv", folder)
    fine(*install(folder / "bin"), *packages)
    return folder / "bin"


def install(programs: Path) -> list[object]:
    """Return the command that installs packages into an environment."""
    return [programs / "pip", "install", "--quiet", "--constraint", ROOT / "constraints.txt"]


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
    whole, parts = contents(wheels, "megacell"), {part: contents(wheels, part) for part in PARTS}
    assert sum(map(len, parts.values())) == len(whole), "no file is in two parts"
    assert set().union(*parts.values()) == whole
    for package, part in zip(PACKAGES, PARTS, strict=True):
        source = ROOT / f"sub-packages/{part}/src"
        options = {str(path.relative_to(source)) for path in source.glob(f"megacell/{package}/configs/**/*.yaml")}
        assert bool(options) == (package in WITH_OPTIONS)
        assert options <= parts[part]
        assert f"megacell/{package}/py.typed" in parts[part]
    assert not [name for name in whole if "/tests/" in name or name == "megacell/__init__.py"]
    assert (wheels / f"megacell-{VERSION}.tar.gz").is_file()


def test_the_whole_needs_and_offers_what_its_parts_do(wheels):
    whole, parts = metadata(wheels, "megacell"), [metadata(wheels, part) for part in PARTS]
    ties = {need for part in parts for need in part.requires if need.startswith("megacell-")}
    assert ties == {f"{part}=={VERSION}" for part in PARTS[:-1]}, "parts go together in one version"
    assert set(whole.requires) == {need for part in parts for need in part.requires} - ties
    assert "torch<2.14,>=2.10" in whole.requires
    extras = [set(each.metadata.get_all("Provides-Extra") or ()) for each in (whole, *parts)]
    assert extras[0] == set().union(*extras[1:]) >= {"dask", "docs", "sweeps", "test"}
    points = {(point.group, point.name, point.value) for point in whole.entry_points}
    assert points == {(point.group, point.name, point.value) for part in parts for point in part.entry_points}
    assert {"console_scripts", "megacell.commands", "megacell.families"} <= {group for group, *_ in points}


def test_two_parts_cannot_give_one_name_to_two_things():
    with pytest.raises(ValueError, match=r"entry-points\.megacell\.commands: two sub-packages have 'a': b:c and d:e"):
        hatch_build().merge({"megacell.commands": {"a": "b:c"}}, {"megacell.commands": {"a": "d:e"}}, "entry-points")


def test_the_store_alone_converts_without_torch(wheels, tmp_path):
    programs = environment(tmp_path / "venv", wheel_of(wheels, "megacell-core"))
    own = {"env": alone(tmp_path), "cwd": tmp_path}
    assert fine(programs / "megacell", "--version", **own).split() == ["megacell", VERSION]
    fine(programs / "megacell", "doctor", "--quick", **own)
    assert "convert" not in fine(programs / "megacell", "--help", **own)
    fine(*install(programs), wheel_of(wheels, "megacell-store"), **own)
    installed = {line.split("==")[0] for line in fine(programs / "pip", "freeze", **own).splitlines()}
    assert not {"torch", "nemo-toolkit", "megatron-core", "lightning"} & installed
    fine(programs / "megacell", "convert", write_cells(tmp_path / "cells.h5ad"), "--out", "store", **own)
    assert "cells      60\n" in fine(programs / "megacell", "info", "store", **own)
    assert "as they were written" in fine(programs / "megacell", "verify", "store", **own)
    fine(programs / "megacell", "doctor", "--quick", **own)
    assert "complete" in fine(programs / "megacell", "completion", "bash", **own)
    assert "pretrain" not in fine(programs / "megacell", "--help", **own)


def unpacked(wheels: Path, folder: Path, *parts: str) -> list[object]:
    """Unpack wheels beside links to all packages but Megacell; return a command for the Python that sees these only."""
    folder.mkdir()
    for path in Path(sysconfig.get_path("purelib")).iterdir():
        if "megacell" not in path.name.lower():
            (folder / path.name).symlink_to(path)
    for part in parts:
        zipfile.ZipFile(wheel_of(wheels, part)).extractall(folder)
    return ["env", f"PYTHONPATH={folder}", sys.executable, "-S"]  # -S: nothing else of site-packages is seen


TRAINING_ALONE = """
import importlib.util
from megacell.core.errors import UsageError
from megacell.training.config.settings import compose
from megacell.training.family import find_family
assert importlib.util.find_spec("megacell.geneformer") is None
for ask in (find_family, lambda: compose(["store=s", "vocabulary=v", "out=o"])):
    try:
        ask()
    except UsageError as error:
        print(error)
"""
GENEFORMER = """
from megacell.geneformer import Vocabulary, rank_encode
from megacell.training.config.settings import compose
from megacell.training.family import find_family
cfg = compose(["store=s", "vocabulary=v", "out=o", "model=geneformer_106m"])
print(find_family().name, cfg.model.layers, cfg.parallel.tensor, Vocabulary.__name__, rank_encode.__name__)
"""


def test_training_stands_without_a_family_and_finds_the_one_that_is_added(wheels, tmp_path):
    own = {"env": alone(tmp_path), "cwd": tmp_path}
    python = unpacked(wheels, tmp_path / "training", *PARTS[:3])
    lines = fine(*python, "-c", TRAINING_ALONE, **own).splitlines()
    assert [line.startswith("family=geneformer: not installed") for line in lines] == [True, True], lines
    told = fine(*python, "-m", "megacell", "--help", **own)
    assert "pretrain" in told
    assert "embed" not in told
    python = unpacked(wheels, tmp_path / "all", *PARTS)
    assert fine(*python, "-c", GENEFORMER, **own).split() == ["geneformer", "12", "1", "Vocabulary", "rank_encode"]


@pytest.mark.exhaustive
@pytest.mark.parametrize("names", [["megacell"], PARTS], ids=["whole", "parts"])
def test_what_is_installed_trains(names, wheels, tmp_path):
    programs = environment(tmp_path / "venv", *(wheel_of(wheels, name) for name in names))
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
