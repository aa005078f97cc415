# SPDX-License-Identifier: Apache-2.0
"""The bench command: it measures three ways that make the same tokens, and refuses where they do not."""

import json

import numpy as np
import pytest

from megacell.core.cli import main as cli
from megacell.core.errors import DataError
from megacell.geneformer.bench import batches as bench
from megacell.geneformer.bench.batches_references import References


@pytest.fixture(scope="module")
def vocabulary_folder(published, tmp_path_factory):
    path = tmp_path_factory.mktemp("vocabulary") / "v2"
    published["V2"].save(path)
    return path


def test_the_command_prints_every_figure_of_the_protocol(real_store, vocabulary_folder, capsys):
    command = ["bench", "batches", str(real_store.path), "--vocabulary", str(vocabulary_folder), "--seconds", "0.03"]
    assert cli.main([*command, "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert set(figures["cells_a_cpu_second"]) == {"megacell", "numpy_a_cell", "dictionary_a_gene"}
    assert figures["cells_a_cpu_second"]["megacell"] > figures["cells_a_cpu_second"]["dictionary_a_gene"]
    assert figures["imbalance_of_64_ranks_at_2048_cells"] < 0.02
    assert 0.97 < figures["real_tokens_of_computed"] <= 1
    assert figures["vocabulary"] == "geneformer-v2"
    assert {"python", "numpy", "numba"} <= set(figures["versions"])
    assert "a dictionary look-up a gene" in bench.table(figures)


def test_no_time_at_all_still_measures_a_step_each(real_store, published):
    figures = bench.bench_batches(real_store, published["V2"], 0)
    assert figures["speed_up_of_2_threads"] > 0
    assert min(figures["cells_a_cpu_second"].values()) > 0


def test_references_that_rank_otherwise_stop_the_measurement(real_store, published, monkeypatch):
    monkeypatch.setattr(References, "numpy_cell", lambda self, row: np.zeros(3, np.int64))
    with pytest.raises(DataError, match=r"cell \d+: the references rank it otherwise"):
        bench.bench_batches(real_store, published["V2"], 0.01)


def test_references_mask_at_the_same_rate_and_no_special(real_store, published):
    references = References(real_store, published["V2"], np.arange(50), 4096)
    tokens = np.concatenate([references.numpy_cell(row) for row in references.rows])
    masked = np.concatenate([references.numpy_mask(references.numpy_cell(row)) for row in references.rows])
    listed = [token for row in references.rows for token in references.dictionary_mask(references.dictionary_cell(row))]
    for out in (masked, np.array(listed)):
        assert 0.12 < np.mean(out != tokens) < 0.15  # 15 %, of which a tenth stays and few are drawn as themselves
        assert ((out == tokens) | (tokens > 3)).all()
