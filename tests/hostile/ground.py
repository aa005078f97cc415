# SPDX-License-Identifier: Apache-2.0
"""What the tried commands read: a few real cells, and of them a store, vocabularies, a run, and models of it."""

from collections.abc import Sequence
from pathlib import Path

from scenarios import TRAIN

CELLS = 60  # of each file
FILES = {"a": "pbmc4k_a", "b": "pbmc4k_b", "c": "pbmc5k_protein"}


def places(ground: Path, data: Path) -> dict[str, Path]:
    """Return the files of the ground by the names that command lines have for them."""
    stores, vocabularies = ("store", "store_a", "store_b"), ("vocabulary", "vocabulary_a", "vocabulary_b")
    dictionaries = data / "geneformer" / "V1"
    return {
        **{name: ground / name for name in ("cells", *stores, *vocabularies, "archive", "run", "hf")},
        "model": ground / "model.nemo",
        "tokens": dictionaries / "token_dictionary_gc30M.pkl",
        "medians": dictionaries / "gene_median_dictionary_gc30M.pkl",
    }


def take_cells(data: Path, cells: Path) -> None:
    """Write the first cells of each real file."""
    import anndata

    cells.mkdir(parents=True)
    for name, source in FILES.items():
        anndata.read_h5ad(data / "cells" / f"{source}.h5ad")[:CELLS].copy().write_h5ad(cells / f"{name}.h5ad")


def lines(*, training: bool) -> list[Sequence[str]]:
    """Return the commands that make the rest, in order, with names in braces."""
    build = ("--split-by", "cell", "--mergeable")
    cells = [
        ("convert", "{cells}", "--out", "{store}", "--workers", "1"),
        ("convert", "{cells}/a.h5ad", "--out", "{store_a}", "--workers", "1"),
        ("convert", "{cells}/b.h5ad", "--out", "{store_b}", "--workers", "1"),
        ("vocabulary", "build", "{store}", "--out", "{vocabulary}", *build),
        ("vocabulary", "build", "{store_a}", "--out", "{vocabulary_a}", *build),
        ("vocabulary", "build", "{store_b}", "--out", "{vocabulary_b}", *build),
        ("scdl", "export", "{store}", "--out", "{archive}"),
    ]
    models = [
        tuple("out={run}" if word == "out=run" else word for word in (*TRAIN, "steps=2")),
        ("export", "{run}", "--to", "nemo", "--out", "{model}"),
        ("export", "{run}", "--to", "hf", "--out", "{hf}"),
    ]
    return cells + models if training else cells


def fill(words: Sequence[str], names: dict[str, Path]) -> list[str]:
    """Return a command line with the ground's files in the place of their names."""
    return [word.format(**names) for word in words]
