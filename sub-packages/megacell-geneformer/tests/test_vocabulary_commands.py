# SPDX-License-Identifier: Apache-2.0
"""`megacell vocabulary`, through the command line's own entry."""

import subprocess
import sys

import pytest

from megacell.geneformer.vocabulary import Vocabulary
from megacell.store.cli import build_parser
from megacell.store.errors import DataError, UsageError


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


@pytest.mark.parametrize("action", ["build", "import"])
def test_an_existing_path_is_refused_before_any_work(action, megacell, tmp_path):
    words = ["absent"] if action == "build" else ["--tokens", "absent", "--medians", "absent"]
    with pytest.raises(UsageError, match="exists"):
        megacell("vocabulary", action, *words, "--out", tmp_path)


def test_importing_the_package_and_its_commands_stays_light():
    """`megacell --help` imports this; numba, pandas and torch take seconds."""
    code = (
        "import sys, megacell.geneformer, megacell.geneformer.commands as c; dir(megacell.geneformer); "
        "print(sorted({'torch', 'nemo', 'numba', 'numpy', 'pandas', 'scipy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_every_public_name_is_found():
    import megacell.geneformer as package

    assert all(callable(getattr(package, name)) for name in package.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = package.nonsense
