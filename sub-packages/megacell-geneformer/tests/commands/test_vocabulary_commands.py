# SPDX-License-Identifier: Apache-2.0
"""`megacell vocabulary`, through the command line's own entry."""

import subprocess
import sys

import anndata
import pytest

from megacell.core.cli.main import build_parser
from megacell.core.errors import DataError, UsageError
from megacell.geneformer.vocabulary.build import MIN_CELLS
from megacell.geneformer.vocabulary.vocabulary import Vocabulary
from megacell.store.sampling.split import SplitSettings


@pytest.fixture
def megacell():
    """Run one of the sub-commands."""

    def run(*words):
        args = build_parser().parse_args([str(word) for word in words])
        return args.run(args)

    return run


def import_words(paths):
    return [w for part, path in paths.items() for w in (f"--{part.replace('_', '-')}", path)]


@pytest.mark.parametrize("edition", ["V1", "V2"])
def test_published_dictionaries_are_imported(edition, megacell, dictionaries, published, tmp_path, capsys):
    out = tmp_path / "vocabulary"
    assert megacell("vocabulary", "import", *import_words(dictionaries[edition]), "--out", out) == 0
    assert Vocabulary.open(out).hash == published[edition].hash
    assert (
        f"vocabulary geneformer-{edition.lower()}, {len(published[edition].gene_ids):,} genes"
        in capsys.readouterr().out
    )


def test_a_mixed_pair_leaves_nothing_behind(megacell, dictionaries, tmp_path):
    mixed = {"tokens": dictionaries["V1"]["tokens"], "medians": dictionaries["V2"]["medians"]}
    with pytest.raises(DataError, match="geneformer-v2"):
        megacell("vocabulary", "import", *import_words(mixed), "--out", tmp_path / "vocabulary")
    assert list(tmp_path.iterdir()) == []


def test_a_vocabulary_is_built_from_a_store(megacell, real_store, tmp_path, capsys):
    out = tmp_path / "vocabulary"
    words = ["--min-cells", 20, "--split-by", "cell", "--holdout", 0.2, "--seed", 4, "--name", "pbmc"]
    assert megacell("vocabulary", "build", real_store.path, "--out", out, *words) == 0
    vocabulary = Vocabulary.open(out)
    assert vocabulary.name == "pbmc"
    assert vocabulary.split == {"by": "cell", "holdout": 0.2, "seed": 4}
    assert vocabulary.provenance["min_cells"] == 20
    printed = capsys.readouterr().out
    assert "split by cell" in printed
    assert f"{len(vocabulary.gene_ids):,} genes" in printed


def test_a_store_given_twice_is_refused(megacell, real_store, tmp_path):
    with pytest.raises(UsageError, match=r"the same store as .*; give each once"):
        megacell("vocabulary", "build", real_store.path, real_store.path, "--out", tmp_path / "vocabulary")
    assert list(tmp_path.iterdir()) == []


def test_a_vocabulary_is_built_mergeable_gone_on_from_and_merged(megacell, data, tmp_path, capsys):
    cells, store = anndata.read_h5ad(data / "cells" / "pbmc4k_a.h5ad"), tmp_path / "store"
    for name, part in (("old", slice(0, 150)), ("new", slice(150, 300)), ("other", slice(300, 450))):
        cells[part].copy().write_h5ad(tmp_path / f"{name}.h5ad")
    build = ["vocabulary", "build", store, "--out"]
    assert megacell("convert", tmp_path / "old.h5ad", "--out", store) == 0
    assert megacell(*build, tmp_path / "exact", "--split-by", "cell") == 0
    assert megacell(*build, tmp_path / "v1", "--split-by", "cell", "--mergeable", "--workers", 2) == 0
    hashes = [Vocabulary.open(tmp_path / name).hash for name in ("exact", "v1")]
    assert hashes[0] == hashes[1]
    assert (tmp_path / "v1" / "histograms.parquet").is_file()
    assert not (tmp_path / "exact" / "histograms.parquet").exists()

    assert megacell("convert", tmp_path / "new.h5ad", "--out", store, "--append") == 0
    capsys.readouterr()
    assert megacell(*build, tmp_path / "v2", "--after", tmp_path / "v1", "--min-cells", 5) == 0
    printed = capsys.readouterr().out
    assert "medians are within 0.20% of the exact ones" in printed
    assert "those in at least 5 of" in printed
    assert Vocabulary.open(tmp_path / "v2").provenance["after"] == hashes[1]
    with pytest.raises(UsageError, match=r"--holdout 0\.3: .*v1 was made with 0\.1"):
        megacell(*build, tmp_path / "v3", "--after", tmp_path / "v1", "--holdout", 0.3)
    with pytest.raises(UsageError, match="--after: give one store, not 2"):
        megacell(*build[:2], store, *build[2:], tmp_path / "v3", "--after", tmp_path / "v1")

    assert megacell("convert", tmp_path / "other.h5ad", "--out", tmp_path / "b") == 0
    words = ["--out", tmp_path / "v3", "--mergeable", "--split-by", "cell"]
    assert megacell("vocabulary", "build", tmp_path / "b", *words) == 0
    capsys.readouterr()
    parts = [tmp_path / "v2", tmp_path / "v3"]
    assert megacell("vocabulary", "merge", *parts, "--out", tmp_path / "all", "--name", "all", "--min-cells", 20) == 0
    printed = capsys.readouterr().out
    assert "2 vocabularies, of " in printed
    assert "medians are within 0.20% of the exact ones" in printed
    merged = Vocabulary.open(tmp_path / "all")
    assert (merged.name, merged.provenance["min_cells"]) == ("all", 20)
    assert (tmp_path / "all" / "histograms.parquet").is_file()


def test_the_help_names_the_defaults_there_are(capsys):
    with pytest.raises(SystemExit):
        build_parser().parse_args(["vocabulary", "build", "--help"])
    told = " ".join(capsys.readouterr().out.split())
    split = SplitSettings()
    assert f"leave out genes in fewer training cells (default: {MIN_CELLS})" in told
    assert f"a column of obs (default: {split.by})" in told
    assert f"share of cells to hold out (default: {split.holdout})" in told
    assert f"share of cells kept for a test (default: {split.test})" in told
    assert f"of the split (default: {split.seed})" in told


@pytest.mark.parametrize("action", ["build", "merge", "import"])
def test_an_existing_path_is_refused_before_any_work(action, megacell, tmp_path):
    words = ["--tokens", "absent", "--medians", "absent"] if action == "import" else ["absent"]
    with pytest.raises(UsageError, match="exists"):
        megacell("vocabulary", action, *words, "--out", tmp_path)


def test_importing_the_package_and_its_commands_stays_light():
    """`megacell --help` imports this; numba, pandas and torch take seconds."""
    code = (
        "import sys, megacell.geneformer, megacell.geneformer.commands.register as c; dir(megacell.geneformer); "
        "print(sorted({'torch', 'nemo', 'numba', 'numpy', 'pandas', 'scipy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_every_public_name_is_found():
    import megacell.geneformer as package

    assert all(callable(getattr(package, name)) for name in package.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = package.nonsense
