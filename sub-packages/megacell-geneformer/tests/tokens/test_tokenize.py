# SPDX-License-Identifier: Apache-2.0
"""The Hugging Face directory: its layout as `datasets` reads it, every cell in it, and the same after any stop."""

import json
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

from megacell.core.cli import main as cli
from megacell.core.errors import DataError, UsageError
from megacell.geneformer.tokens import tokenize as module
from megacell.geneformer.tokens.rank_encoder import rank_encode
from megacell.geneformer.tokens.tokenize import tokenize
from megacell.store import convert


def read(folder):
    """Read a directory as `datasets` does: the files that state.json names, each an Arrow stream, in that order."""
    state = json.loads((folder / "state.json").read_text())
    tables = []
    for entry in state["_data_files"]:
        with pa.memory_map(str(folder / entry["filename"])) as source, pa.ipc.open_stream(source) as stream:
            tables.append(stream.read_all())
    return pa.concat_tables(tables)


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def store(made_up):
    """100 cells of 20 genes with obs of each kind, every tenth cell empty."""
    counts = np.random.default_rng(0).poisson(1.0, (100, 20)) + 1
    counts[::10] = 0
    store = made_up(counts, donors=["a", "b", None, "c"] * 25)
    store.obs["age"] = np.arange(100)
    store.obs["score"] = np.linspace(0, 1, 100)
    store.obs["sick"] = np.arange(100) % 2 == 0
    store.obs["seen"] = pd.array([1, None] * 50, "Int64")
    store.obs_columns = list(store.obs.columns)
    return store


def test_every_cell_stands_in_the_stores_order_with_its_metadata(store, vocabulary_for, tmp_path):
    vocabulary = vocabulary_for(20)
    lines = tokenize(store, vocabulary, tmp_path / "out", max_length=12, cells_a_file=30)
    table = read(tmp_path / "out").to_pydict()
    cells = [c for c in range(100) if c % 10]
    tokens, cu = rank_encode(store.matrix, store.gene_ids, vocabulary, 12)
    every = [tokens[a:b].tolist() for a, b in pairwise(cu)]
    assert table["input_ids"] == [every[cell] for cell in cells]
    assert table["length"] == [len(every[cell]) for cell in cells]
    assert table["cell"] == table["age"] == cells
    assert table["donor_id"] == [["a", "b", None, "c"][cell % 4] for cell in cells]
    assert table["sick"] == [cell % 2 == 0 for cell in cells]
    assert table["seen"] == [None if cell % 2 else 1 for cell in cells]
    assert "10 cells have no gene of the vocabulary" in lines[1]


def test_the_layout_is_that_of_save_to_disk(store, vocabulary_for, tmp_path):
    tokenize(store, vocabulary_for(20), tmp_path / "out", cells_a_file=40)
    files = {"data-00000-of-00003.arrow", "data-00001-of-00003.arrow", "data-00002-of-00003.arrow"}
    assert set(contents(tmp_path / "out")) == {*files, "dataset_info.json", "state.json"}
    features = json.loads((tmp_path / "out" / "dataset_info.json").read_text())["features"]
    assert set(features) == set(read(tmp_path / "out").column_names)
    assert features["input_ids"] == {"feature": {"dtype": "int32", "_type": "Value"}, "_type": "Sequence"}
    kinds = {name: feature["dtype"] for name, feature in features.items() if name != "input_ids"}
    assert kinds == {
        "length": "int64", "cell": "int64", "source": "string", "donor_id": "string", "age": "int64",
        "score": "float64", "sick": "bool", "seen": "int64",
    }  # fmt: skip


@pytest.mark.parametrize("write", [0, 1, 2], ids="stopped at file {}".format)
def test_a_run_that_was_stopped_goes_on_to_the_same_bytes(write, store, vocabulary_for, tmp_path, monkeypatch):
    tokenize(store, vocabulary_for(20), tmp_path / "whole", cells_a_file=40)
    original, written = module._batch, []

    def stop(*args):
        if len(written) == write:
            raise KeyboardInterrupt
        written.append(args[2][0])
        return original(*args)

    monkeypatch.setattr(module, "_batch", stop)
    with pytest.raises(KeyboardInterrupt):
        tokenize(store, vocabulary_for(20), tmp_path / "out", cells_a_file=40)
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(module, "_batch", lambda *args: written.append(args[2][0]) or original(*args))
    lines = tokenize(store, vocabulary_for(20), tmp_path / "out", cells_a_file=40)
    assert written == sorted(set(written))  # no file was made twice
    assert any("files were there already" in line for line in lines) == (write > 0)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_a_stop_while_files_get_their_names_does_no_harm(store, vocabulary_for, tmp_path, monkeypatch):
    tokenize(store, vocabulary_for(20), tmp_path / "whole", cells_a_file=40)
    describe = module._describe
    monkeypatch.setattr(module, "_describe", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        tokenize(store, vocabulary_for(20), tmp_path / "out", cells_a_file=40)
    monkeypatch.setattr(module, "_describe", describe)
    tokenize(store, vocabulary_for(20), tmp_path / "out", cells_a_file=40)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_what_another_vocabulary_left_unfinished_is_not_taken_up(store, vocabulary_for, tmp_path, monkeypatch):
    original = module._describe
    monkeypatch.setattr(module, "_describe", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        tokenize(store, vocabulary_for(20, medians=np.ones(20)), tmp_path / "out")
    monkeypatch.setattr(module, "_describe", original)
    tokenize(store, vocabulary_for(20), tmp_path / "out")
    tokenize(store, vocabulary_for(20), tmp_path / "whole")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_what_is_there_is_not_overwritten_and_what_does_not_fit_is_refused(store, vocabulary_for, tmp_path):
    with pytest.raises(UsageError, match="exists"):
        tokenize(store, vocabulary_for(20), tmp_path)
    with pytest.raises(DataError, match="measures 10"):
        tokenize(store, vocabulary_for(200), tmp_path / "out")


def test_the_command_writes_real_cells(real_store, real_cells, published, tmp_path, capsys):
    published["V2"].save(tmp_path / "v2")
    command = ["tokenize", str(real_store.path), "--vocabulary", str(tmp_path / "v2"), "--out", str(tmp_path / "out")]
    assert cli.main(command) == 0
    assert "2,370 cells in 1 files" in capsys.readouterr().out
    table = read(tmp_path / "out")
    counts, ids = real_cells["pbmc4k_a"]
    tokens, cu = rank_encode(counts, ids, published["V2"])
    assert table["input_ids"][:1100].to_pylist() == [tokens[a:b].tolist() for a, b in pairwise(cu)]
    assert table["cell_type"].to_pylist()[:5] == real_store.obs["cell_type"].astype(object).tolist()[:5]


def test_killed_at_any_step_it_goes_on_to_the_same_bytes(vocabulary_for, tmp_path):
    draw = np.random.default_rng(0)
    counts = draw.poisson(20 * draw.lognormal(0, 0.7, (100, 20))).astype(np.float32)
    var = pd.DataFrame(index=[f"ENSG{g:011d}" for g in range(20)])
    obs = pd.DataFrame({"kind": pd.Categorical(["a", None] * 50), "age": range(100)}, [f"c{i}" for i in range(100)])
    anndata.AnnData(counts, obs=obs, var=var).write_h5ad(tmp_path / "cells.h5ad")
    convert(tmp_path / "cells.h5ad", tmp_path / "store", allow_subset=True)
    vocabulary_for(20).save(tmp_path / "vocabulary")
    script = Path(__file__).parents[1] / "kill_tokenize.py"
    words = [sys.executable, script, tmp_path / "store", tmp_path / "vocabulary", tmp_path]
    done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=240)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["kills"] > 60
    assert found["taken_up"] > 10
