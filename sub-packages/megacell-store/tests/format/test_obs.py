# SPDX-License-Identifier: Apache-2.0
"""The cells' metadata of many files under one schema."""

import numpy as np
import pandas as pd
import pytest
from pandas.testing import assert_frame_equal

from megacell.core.errors import DataError
from megacell.store import CellStore, convert

NAMES = [f"c{i}" for i in range(60)]


@pytest.fixture
def store_of(made, save, tmp_path):
    """A function that converts one file for each frame of metadata and opens the store."""

    def make(*frames: pd.DataFrame, together: bool = True) -> CellStore:
        files = [
            save(made.anndata(made.counts(60, 300, seed=i), obs=obs), f"f{i}.h5ad") for i, obs in enumerate(frames)
        ]
        for number, batch in enumerate([files] if together else [[file] for file in files]):
            convert(batch, tmp_path / "store", append=number > 0, allow_subset=True)
        return CellStore.open(tmp_path / "store")

    return make


def frame(**columns) -> pd.DataFrame:
    return pd.DataFrame({name: (value * 60)[:60] for name, value in columns.items()}, index=NAMES)


def test_one_files_metadata_come_back_as_they_were(store_of):
    obs = pd.DataFrame(
        {
            "type": pd.Categorical((["B", None, "T"] * 20), categories=["T", "B", "unused"]),
            "stage": pd.Categorical(["late", "early"] * 30, categories=["early", "late"], ordered=True),
            "barcode": [f"{i:x}" for i in range(60)],
            "n_counts": np.arange(60),
            "share": [0.5, np.nan, 2.0] * 20,
            "doublet": [True, False] * 30,
            "maybe": pd.array([True, None, False] * 20, dtype="boolean"),
            "count": pd.array([1, None, 3] * 20, dtype="Int64"),
        },
        index=NAMES,
    )
    found = store_of(obs).obs.drop(columns="source")
    assert_frame_equal(found, obs)


@pytest.mark.parametrize("together", [True, False], ids=["in one shard", "one appended to the other"])
def test_schemas_are_united(store_of, together):
    a = frame(kind=pd.Categorical(["x", "y"]).tolist(), age=[30, 31], depth=[1, 2], only_a=["p"], flag=[True, False])
    b = frame(kind=["y", "z"], age=["adult", None], depth=[0.5], only_b=[1.5], flag=[1, 0])
    a["kind"], b["kind"] = a["kind"].astype("category"), b["kind"].astype("category")
    obs = store_of(a, b, together=together).obs
    assert list(obs["kind"].cat.categories) == ["x", "y", "z"]
    assert obs["age"].tolist()[:3] == ["30", "31", "30"]
    assert obs["age"].isna().sum() == 30
    assert obs["depth"].dtype == np.float64
    assert obs["depth"].tolist()[:2] + obs["depth"].tolist()[-1:] == [1.0, 2.0, 0.5]
    assert obs["only_a"][:60].eq("p").all()
    assert obs["only_a"][60:].isna().all()
    assert obs["only_b"][:60].isna().all()
    assert obs["flag"].tolist()[:2] + obs["flag"].tolist()[-2:] == ["True", "False", "1", "0"]
    assert obs["source"].tolist() == ["f0"] * 60 + ["f1"] * 60


@pytest.mark.parametrize("other", [["x", "y"], [1, 2], [0.5], [True, False]], ids=["text", "whole", "real", "truth"])
def test_a_column_without_values_takes_any_kind(store_of, other):
    empty = frame(a=[np.nan])
    full = frame(a=other)
    found = store_of(empty, full).obs["a"]
    assert found[:60].isna().all()
    assert found[60:].tolist() == full["a"].tolist()


def test_a_column_without_values_anywhere_stays_missing(store_of):
    assert store_of(frame(a=[np.nan]), frame(a=[np.nan])).obs["a"].isna().all()


def test_a_column_of_ours_in_the_file_is_kept_under_another_name(store_of):
    store = store_of(frame(source=["lab"]))
    assert store.obs["source"].unique().tolist() == ["f0"]
    assert store.obs["source_in_file"].unique().tolist() == ["lab"]


def test_one_column_is_read_without_the_others(store_of):
    store = store_of(frame(a=[1, 2]), frame(b=["u", "v"]))
    assert store.obs_columns == ["a", "b", "source"]
    for name in store.obs_columns:
        pd.testing.assert_series_equal(store.obs_column(name), store.obs[name])


@pytest.mark.parametrize(("start", "stop"), [(0, 120), (50, 70), (60, 61), (7, 7), (0, 0), (120, 120)])
def test_a_slice_is_that_of_all_metadata_with_numbers_for_names(start, stop, store_of):
    store = store_of(
        frame(a=[1, 2], c=["x", "y", None]), frame(b=["u", "v"], a=[True, False]), frame(a=[3, None]), together=False
    )
    for columns in (None, ["a"], ["source", "c"]):
        found = store.obs_slice(columns, start, stop)
        expected = store.obs[store.obs_columns if columns is None else [c for c in store.obs_columns if c in columns]]
        assert found.index.tolist() == list(range(start, stop))
        expected = expected.iloc[start:stop].set_axis(found.index)
        pd.testing.assert_frame_equal(found, expected, check_dtype=False)
        assert (found.dtypes == "category").equals(expected.dtypes == "category")


def test_a_slice_reads_no_shard_beside_and_no_names(store_of, monkeypatch):
    store, asked = store_of(frame(a=[1]), frame(a=[2]), frame(a=[3]), together=False), []
    real = CellStore._obs_table
    monkeypatch.setattr(CellStore, "_obs_table", lambda *args: asked.append(args[1:]) or real(*args))
    assert store.obs_slice(["a"], 60, 120)["a"].tolist() == [2] * 60
    assert [names for _, names in asked] == [["a"]] * len({shard.name for shard, _ in asked})
    assert len(asked) < len(store.manifest.shards)
    with pytest.raises(DataError, match="no cells 0 to 181; there are 180"):
        store.obs_slice(None, 0, 181)


def test_repeated_cell_names_and_numbers_as_names_are_kept(store_of):
    obs = frame(a=[1])
    obs.index = pd.Index([i % 7 for i in range(60)])
    assert store_of(obs).obs.index.tolist() == [str(i % 7) for i in range(60)]


def test_too_many_categories_become_text(store_of, monkeypatch):
    monkeypatch.setattr("megacell.store.format.obs.MOST_CATEGORIES", 10)
    obs = frame(barcode=[f"b{i}" for i in range(60)])
    obs["barcode"] = obs["barcode"].astype("category")
    found = store_of(obs).obs["barcode"]
    assert found.tolist() == obs["barcode"].tolist()
    assert found.dtype == object
