# SPDX-License-Identifier: Apache-2.0
"""bench embed: it measures only what agrees, and once the whole command."""

import json

import numpy as np
import pytest
from runs import fine

from megacell.core.errors import DataError
from megacell.geneformer.bench import embed as bench_embed
from megacell.geneformer.commands.bench_embed import CONTENDERS
from megacell.geneformer.vocabulary.vocabulary import Vocabulary


def test_the_command_knows_the_contenders():
    assert set(CONTENDERS) == set(bench_embed.CONTENDERS)


def test_what_does_not_agree_is_not_measured():
    ours = np.ones((3, 4), np.float32)
    assert bench_embed._apart(ours + 1e-6, ours, "some") < 2e-6
    with pytest.raises(DataError, match=r"some: its embeddings differ by 1\.0e-03"):
        bench_embed._apart(ours + 1e-3, ours, "some")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("as_emb_extractor", [([3, 2], 90), ([1], 90), ([4, 5], 50), ([6], 50)]),
        ("as_helical", [([0, 1], 90), ([2, 3], 90)]),
        ("hugging_face_sorted_without_head", [([3, 2], 90), ([1, 4], 60)]),
        ("hugging_face_fixed", [([0, 1], 128), ([2, 3], 128)]),
    ],
)
def test_cells_are_padded_as_the_packages_do(name, expected):
    lengths = np.array([10, 60, 70, 90, 50, 40, 30, *[20] * 20])
    passes = bench_embed.widths(bench_embed.CONTENDERS[name], lengths, 2, 128)
    assert [(part.tolist(), width) for part, width in passes[: len(expected)]] == expected
    assert sorted(np.concatenate([part for part, _ in passes])) == list(range(27))


def test_all_contenders_give_the_same_embeddings_and_figures(store, vocabulary):
    figures = bench_embed.bench_embed(store, Vocabulary.open(vocabulary), "tiny", 5, 2, 1, list(CONTENDERS))
    assert list(figures["cells_per_second"]) == ["megacell", *CONTENDERS]
    assert figures["cells"] == {"megacell": 5, **dict.fromkeys(CONTENDERS, 5), bench_embed.FIXED: 2}
    assert max(figures["largest_difference"].values()) <= 1e-5
    of = figures["rounds_cells_per_second"]
    assert figures["times"]["as_helical"] == of["megacell"][0] / of["as_helical"][0]
    assert 0 < figures["filled"]["hugging_face_fixed"] < figures["filled"]["as_helical"] <= 1
    assert "hugging_face_fixed" in bench_embed.table(figures)


@pytest.mark.exhaustive
def test_a_model_is_converted_and_opened_in_less_than_three_times_its_size(vocabulary):
    files = bench_embed.bench_files(Vocabulary.open(vocabulary), "geneformer_106m", 1)
    assert max(files[f"{what}_memory_of_its_size"] for what in ("convert", "return", "open")) < 3


@pytest.mark.exhaustive
def test_the_command_measures_models_as_well(store, vocabulary, tmp_path):
    said = fine(
        "bench", "embed", store, "--vocabulary", vocabulary, "--model", "tiny", "--files", "tiny", "--cells", "4",
        "--batch", "2", "--rounds", "1", "--json", tmp_path / "f.json",
    )  # fmt: skip
    files = json.loads((tmp_path / "f.json").read_text())["files"]
    for what in ("convert", "return", "open"):
        assert files[f"{what}_seconds"] > 0
        assert files[f"{what}_memory_of_its_size"] > 0
    assert "times its size" in said
