# SPDX-License-Identifier: Apache-2.0
"""Evaluation sees the masked genes of training's validation, and its baselines are training's own."""

import re
import shutil

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import torch
from omegaconf import OmegaConf

from megacell.core.errors import DataError, UsageError
from megacell.geneformer.evaluation.evaluate import PREDICTORS, Evaluation, evaluate
from megacell.geneformer.interchange import hugging_face
from megacell.geneformer.interchange.open import open_model
from megacell.geneformer.model.bert import Pack
from megacell.geneformer.pretraining.data import TrainingData
from megacell.geneformer.pretraining.frequency_baselines import fit_frequencies, frequency_losses
from megacell.geneformer.tokens.masking import MaskSettings
from megacell.geneformer.tokens.tokenize import tokenize
from megacell.geneformer.vocabulary.build import build_vocabulary
from megacell.store import CellStore, convert
from megacell.store.sampling.split import SplitSettings, split_cells
from megacell.training.distributed import device
from megacell.training.interchange.nemo import save
from megacell.training.run.recorded import store_record

CELLS, GENES, BATCH, SEED = 80, 300, 8, 3
EVERY_CELL = {"where": None, "exclude": None, "balance": None, "order": "shuffled"}
SPLIT = {"by": "plate", "holdout": 0.2, "seed": 1}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("evaluate")


def write_store(folder, matrix):
    """A store of cells of two kinds on ten plates of eight."""
    obs = pd.DataFrame(index=[f"cell{i}" for i in range(CELLS)])
    obs["plate"] = [f"plate{i % 10}" for i in range(CELLS)]
    obs["kind"] = pd.Categorical(
        np.where(np.arange(CELLS) % 7 == 0, None, np.where(np.arange(CELLS) // 10 % 2, "a", "b"))
    )
    var = pd.DataFrame(index=[f"ENSG{i:011d}" for i in range(GENES)])
    folder.mkdir(exist_ok=True)
    ad.AnnData(matrix.astype(np.float32), obs=obs, var=var).write_h5ad(folder / "cells.h5ad")
    convert(folder / "cells.h5ad", folder / "store", allow_subset=True)
    return CellStore.open(folder / "store")


@pytest.fixture(scope="module")
def counts():
    draw = np.random.default_rng(0)
    rates, depths = draw.gamma(0.5, 4.0, size=GENES), draw.lognormal(sigma=0.5, size=(CELLS, 1))
    return draw.poisson(rates * depths)


@pytest.fixture(scope="module")
def store(folder, counts):
    return write_store(folder / "umi", counts)


@pytest.fixture(scope="module")
def vocabulary(store):
    return build_vocabulary(store, SplitSettings(**SPLIT), allow_subset=True)[0]


@pytest.fixture(scope="module")
def model(folder, store, vocabulary, model_for):
    """A .nemo file of an untrained model that says how a run would have split and masked."""
    data = {"split": SPLIT, "masking": {"rate": 0.15, "mask": 0.8, "random": 0.1}, "seed": SEED}
    save(model_for(vocabulary, provenance={"step": 0, "data": data}, max_length=128), folder / "model.nemo")
    return folder / "model.nemo"


@pytest.fixture
def model_with(store, vocabulary, model_for, tmp_path):
    """Make the same model with more said of its run."""

    def make(record=None, **data):
        told = {"split": SPLIT, "masking": {"rate": 0.15, "mask": 0.8, "random": 0.1}, "seed": SEED, **data}
        provenance = {"step": 0, "data": told, "store": record or store_record(store)}
        path = tmp_path / f"model{len(list(tmp_path.iterdir()))}.nemo"
        save(model_for(vocabulary, provenance=provenance, max_length=128), path)
        return path

    return make


@pytest.fixture(scope="module")
def training(folder, store, vocabulary):
    """The same cells as a training run opens them."""
    vocabulary.save(folder / "vocabulary")
    return TrainingData.open(
        OmegaConf.create({
            "store": str(store.path), "vocabulary": str(folder / "vocabulary"), "seed": SEED,
            "model": {"max_length": 128}, "batch": {"cells": BATCH, "tokens": 2048}, "validation": {"cells": 2000},
            "data": {**EVERY_CELL, "split": SPLIT, "masking": vars(MaskSettings()), "allow_low_coverage": False},
        })
    )  # fmt: skip


@pytest.fixture(scope="module")
def result(model, store):
    return evaluate(model, store.path, by="kind")


def test_the_frequency_baselines_are_those_that_training_prints(result, training):
    assert len(training.train) % BATCH == 0, "fitted on whole batches: on every training cell once, as evaluation is"
    expected = frequency_losses(fit_frequencies(training, most=10**6), training)
    row = result.rows[0]
    assert (row["group"], row["cells"]) == ("all", len(training.validation))
    assert row["masked_genes"] == expected["masked_genes"]
    assert row["frequency"][0] == pytest.approx(expected["frequency"], rel=1e-12)
    assert row["rank_frequency"][0] == pytest.approx(expected["rank_frequency"], rel=1e-12)
    assert result.fitted_cells == len(training.train)


def test_the_split_is_that_of_the_models_run(result, training):
    assert "plate" in result.split
    assert len(training.validation) == 16


def test_groups_make_up_the_whole(result):
    everything, *groups = result.rows
    assert {row["group"] for row in groups} == {"a", "b", "(missing)"}
    assert sum(row["cells"] for row in groups) == everything["cells"]
    assert sum(row["masked_genes"] for row in groups) == everything["masked_genes"]
    for name in PREDICTORS:
        mean = sum(row[name][0] * row["masked_genes"] for row in groups) / everything["masked_genes"]
        assert mean == pytest.approx(everything[name][0], rel=1e-9)
        assert all(row[name][1] > 0 for row in result.rows)


def test_count_arithmetic_beats_frequency_and_an_untrained_model_does_not(result):
    row = result.rows[0]
    assert row["count_arithmetic"][0] < row["frequency"][0] < row["model"][0]


def test_accuracy_is_how_often_the_likeliest_gene_is_right(model, store, training, result):
    opened, right, frequency = open_model(model), [], fit_frequencies(training, most=10**6)
    common = []
    stream = training.stream(held_out=True)
    for batch in (batch for step in range(stream.steps_per_epoch) for batch in stream.step(step)):
        with torch.inference_mode(), device.single_process():
            pack = Pack.of(batch, "cpu")
            logits = opened.bert.logits(opened.bert.encode(pack)[pack.masked])
        right += (logits.numpy().argmax(1) == batch.labels).tolist()
        common += (batch.labels == frequency.token_counts.argmax()).tolist()
    accuracy = result.rows[0]["accuracy"]
    assert accuracy["model"][0] == pytest.approx(np.mean(right), rel=1e-12)
    assert accuracy["frequency"][0] == pytest.approx(np.mean(common), rel=1e-12)
    assert 0 <= accuracy["rank_frequency"][0] <= 1
    assert "count_arithmetic" not in accuracy


def test_a_model_from_elsewhere_is_evaluated_on_cells_held_out_by_default(model_for, store, vocabulary, tmp_path):
    made = model_for(vocabulary, max_length=128, norm="post", activation="relu")
    hugging_face.save(made, tmp_path / "hf")
    found = evaluate(tmp_path / "hf", store.path, cells=4)
    assert "may be among them" in found.split
    assert found.rows[0]["cells"] == 4
    assert np.isfinite([found.rows[0][name] for name in PREDICTORS]).all()


def test_fewer_cells_are_drawn_the_same_each_time(model, store, result):
    few, again = (evaluate(model, store.path, cells=5) for _ in range(2))
    assert few == again
    assert few.rows[0]["cells"] == 5
    assert few.rows[0]["masked_genes"] < result.rows[0]["masked_genes"]


def test_fractional_counts_have_no_arithmetic_and_the_rest_stands(folder, counts, model, result):
    store = write_store(folder / "fractional", np.where(counts > 0, counts - 0.3 * (np.arange(GENES) % 2), 0))
    found = evaluate(model, store.path)
    assert found.rows[0]["count_arithmetic"] is None
    assert "count arithmetic is not defined here" in found.split
    assert found.rows[0]["cells"] == result.rows[0]["cells"]
    assert np.isfinite(found.rows[0]["frequency"][0])
    assert "not defined" in found.table().splitlines()[2]


def test_the_test_is_of_the_cells_that_were_kept_for_it(model_with, store, result):
    model = model_with(split={**SPLIT, "test": 0.3})
    sides = split_cells(store, SplitSettings(**SPLIT, test=0.3))
    found = evaluate(model, store.path, side="test")
    assert found.split.startswith("test cells; split by plate")
    assert found.rows[0]["cells"] == sides.test.sum() == 24
    assert found.fitted_cells == sides.train.sum() == 40
    assert evaluate(model, store.path).rows[0]["model"] == result.rows[0]["model"]  # validation is what it was
    with pytest.raises(DataError, match=r"no cells held out.*test cells"):
        evaluate(model_with(), store.path, side="test")


def test_cells_that_the_run_left_out_are_left_out(model_with, store):
    found = evaluate(model_with(choice={"where": "kind == 'a'", "exclude": None}), store.path, by="kind")
    assert [row["group"] for row in found.rows] == ["all", "a"]


def test_a_store_that_has_grown_is_taken_as_the_run_saw_it(model_with, folder, store, result, tmp_path):
    shutil.copytree(store.path, tmp_path / "grown")
    cells = ad.read_h5ad(folder / "umi" / "cells.h5ad")
    cells.obs["plate"] = [f"new{i % 10}" for i in range(CELLS)]
    cells.write_h5ad(tmp_path / "more.h5ad")
    convert(tmp_path / "more.h5ad", tmp_path / "grown", append=True, allow_subset=True)
    found = evaluate(model_with(), tmp_path / "grown", by="kind")
    assert found.rows == result.rows
    assert "as of generation 1, before the store grew" in found.split


def test_another_store_is_taken_whole_and_said_to_be_another(model_with, store, result):
    record = {**store_record(store), "digest": "0" * 16}
    found = evaluate(model_with(record, choice={"where": "colour == 'red'", "exclude": None}), store.path)
    assert found.rows[0] == result.rows[0]
    assert "not the cells of the model's own run" in found.split


def test_of_a_tokenised_corpus_all_is_the_same_but_for_what_needs_counts(model_with, store, vocabulary, tmp_path):
    tokenize(store, vocabulary, tmp_path / "corpus", max_length=128)
    found, counted = (evaluate(model_with(), path, cells=8) for path in (tmp_path / "corpus", store.path))
    assert found.rows[0]["count_arithmetic"] is None
    assert "count arithmetic is not defined here: tokens tell no counts" in found.split
    assert found.rows[0]["cells"] == counted.rows[0]["cells"] == 8
    assert np.isfinite(found.rows[0]["model"]).all()


def test_the_table_has_a_line_a_group_and_four_losses():
    row = {"group": "all", "cells": 3, "masked_genes": 40, "model": (1.5, 0.25), "frequency": (2.0, 0.1),
           "rank_frequency": (1.75, 0.1), "count_arithmetic": None,
           "accuracy": {"model": (0.125, 0.01), "frequency": (0.0, 0.0), "rank_frequency": (1.0, 0.0)}}  # fmt: skip
    first, head, line = Evaluation("split by plate", 5, [row]).table().splitlines()
    assert "split by plate" in first
    assert head.split() == [
        "cells", "masked", "model", "gene", "frequency", "frequency", "at", "that", "rank", "count", "arithmetic",
    ]  # fmt: skip
    assert re.fullmatch(
        r"all +3 +40 +1\.500 ± 0\.250 +12\.5% +2\.000 ± 0\.100 +0\.0% +1\.750 ± 0\.100 +100\.0% +not defined", line
    )


@pytest.mark.parametrize("cells", [0, -5])
def test_no_cells_to_look_at_is_wrong_usage(cells, model, store):
    with pytest.raises(UsageError, match=f"--cells {cells}"):
        evaluate(model, store.path, cells=cells)


def test_a_column_that_is_not_there_is_named_with_those_that_are(model, store):
    with pytest.raises(UsageError, match=r"--by colour: .* has no such column; it has .*kind"):
        evaluate(model, store.path, by="colour")


def test_a_store_of_which_nothing_was_held_out_is_refused(folder, model, store, vocabulary, model_for):
    data = {"split": {**SPLIT, "holdout": 0.0}, "masking": {"rate": 0.15, "mask": 0.8, "random": 0.1}, "seed": SEED}
    path = folder / "greedy.nemo"
    save(model_for(vocabulary, provenance={"step": 0, "data": data}, max_length=128), path)
    with pytest.raises(DataError, match="no cells held out"):
        evaluate(path, store.path)
