# SPDX-License-Identifier: Apache-2.0
"""Which matrices are taken for counts, and which are refused in words that help."""

import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

from megacell.core.errors import DataError, UsageError
from megacell.store import CellStore, convert

ALLOWED = {"allow_subset": True}


def normalised(counts, target=1e4):
    return (counts / counts.sum(axis=1, keepdims=True) * target).astype(np.float32)


def tpm(counts):
    lengths = np.random.default_rng(1).uniform(500, 5000, counts.shape[1])
    return normalised(counts / lengths, 1e6)


def recovered(path, store):
    convert(path, store, counts="recover", **ALLOWED)
    return CellStore.open(store).rows(slice(None)).toarray()


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda c: np.where(np.arange(c.size).reshape(c.shape) == 77, np.nan, c), "NaN or infinite"),
        (lambda c: c - c.mean(axis=0), "negative values"),
        (lambda c: np.zeros_like(c), "no values above zero"),
        (normalised, "normalised values"),
        (lambda c: np.round(normalised(c)), "near-constant totals"),
        (lambda c: np.round(normalised(c, 1e6)), "near-constant totals"),
        (lambda c: np.log1p(normalised(c)), "log-normalised values"),
        (lambda c: np.log1p(np.sqrt(c) * 0.77), "log"),
        (lambda c: np.round(normalised(c, 4e4))[:, :150] * (np.arange(150) % 3 > 0), "normalised values"),
        (lambda c: (c > 0) * 1.0, "presence and absence"),
        (tpm, "TPM.*--allow-length-normalised"),
    ],
    ids=[
        "NaN",
        "scaled to mean zero",
        "all zero",
        "CP10k",
        "rounded CP10k",
        "rounded CPM",
        "log CP10k",
        "log of square roots",
        "rounded CP40k of some genes",
        "binary",
        "TPM",
    ],
)
def test_what_is_no_counts_is_refused_with_file_place_and_mend(spoil, reason, counts, save, tmp_path):
    path = save(spoil(counts).astype(np.float32))
    with pytest.raises(DataError, match=rf"made\.h5ad.*X.*{reason}") as raised:
        convert(path, tmp_path / "store", **ALLOWED)
    advice = str(raised.value)
    recovers = reason == "log-normalised values"
    assert ("--counts recover" in advice) == recovers
    assert recovers or "no matrix of the file holds counts" in advice or "--allow" in advice
    if recovers:
        np.testing.assert_array_equal(recovered(path, tmp_path / "recovered"), counts)
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize("cell", [0, 40], ids=["within the sample", "beyond the sample"])
@pytest.mark.parametrize("value", [np.nan, -3.0, np.inf])
def test_one_bad_value_anywhere_is_found(cell, value, made, save, tmp_path, monkeypatch):
    monkeypatch.setattr("megacell.store.sources.choice.SAMPLE_RUNS", 1)
    counts = made.counts(60, 300)
    counts[cell, 5] = value
    with pytest.raises(DataError, match=r"made\.h5ad"):
        convert(save(sp.csr_matrix(counts)), tmp_path / "store", **ALLOWED)
    assert not (tmp_path / "store").exists()


def test_fractions_are_kept_as_such(counts, save, made, tmp_path):
    ambient_removed = (counts * np.random.default_rng(0).uniform(0.7, 1, counts.shape)).astype(np.float32)
    path = save(ambient_removed)
    report = convert(path, tmp_path / "store", **ALLOWED)
    assert report.sources[0].kind == "fractional"
    store = CellStore.open(tmp_path / "store")
    np.testing.assert_array_equal(store.rows(slice(None)).toarray(), ambient_removed)


def test_fractions_met_late_make_the_source_fractional(made, save, tmp_path, monkeypatch):
    monkeypatch.setattr("megacell.store.sources.choice.SAMPLE_RUNS", 1)
    counts = made.counts(60, 300)
    counts[50:] *= np.float32(0.9)
    lines = []
    report = convert(save(counts), tmp_path / "store", log=lines.append, **ALLOWED)
    assert report.sources[0].kind == "fractional"
    assert any("fractions among whole counts" in line for line in lines)
    np.testing.assert_array_equal(CellStore.open(tmp_path / "store").rows(slice(None)).toarray(), counts)


def test_tpm_is_taken_if_asked_for_and_says_that_medians_do_not_apply(counts, save, tmp_path):
    report = convert(save(tpm(counts)), tmp_path / "store", allow_length_normalised=True, **ALLOWED)
    assert report.sources[0].kind == "length-normalised"
    assert any("medians" in note for note in report.sources[0].notes)


def test_naming_a_matrix_does_not_make_it_counts(counts, made, save, tmp_path):
    data = made.anndata(normalised(counts))
    data.layers["mine"] = counts
    path = save(data)
    with pytest.raises(DataError, match=r"no counts found \(X has .*--counts layer:mine"):
        convert(path, tmp_path / "store", **ALLOWED)
    with pytest.raises(DataError, match=r"made\.h5ad: X has .*--counts layer:mine"):
        convert(path, tmp_path / "store", counts="X", **ALLOWED)
    with pytest.raises(UsageError, match=r"no layer:other; --counts can be auto, layer:mine, X or recover"):
        convert(path, tmp_path / "store", counts="layer:other", **ALLOWED)
    report = convert(path, tmp_path / "store", counts="layer:mine", **ALLOWED)
    assert report.sources[0].matrix == "layer:mine"


def test_parts_of_counts_are_not_taken_for_counts(counts, made, save, tmp_path):
    data = made.anndata(np.log1p(normalised(counts)))
    data.layers["spliced"] = counts
    with pytest.raises(DataError, match="no counts found"):
        convert(save(data), tmp_path / "store", **ALLOWED)


def test_recover_refuses_what_no_counts_encode_to(counts, save, tmp_path):
    path = save(np.log1p(normalised(counts * np.random.default_rng(0).uniform(0.5, 1, counts.shape))))
    with pytest.raises(DataError, match=r"cell \d+: no whole counts encode to the stored values"):
        convert(path, tmp_path / "store", counts="recover", **ALLOWED)
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize("decimals", [None, 3, 5], ids=["float32", "three decimals", "five decimals"])
@pytest.mark.parametrize("smallest", [1, 2], ids=["cells with ones", "cells whose smallest count is two"])
def test_recover_gives_whole_counts_at_the_stored_precision(decimals, smallest, made, save, tmp_path):
    counts = made.counts(60, 300, depth=1500.0)
    counts[(counts > 0) & (counts < smallest)] = 0
    counts[:, 0] = 3  # not all multiples of two: else no one could tell
    stored = np.log1p(normalised(counts))
    if decimals:
        stored = np.round(stored, decimals)
    convert(save(sp.csc_matrix(stored)), tmp_path / "store", counts="recover", **ALLOWED)
    np.testing.assert_array_equal(CellStore.open(tmp_path / "store").rows(slice(None)).toarray(), counts)


@pytest.mark.parametrize(
    ("large", "dtype"),
    [(0.005, "uint8"), (0.05, "uint16"), (0.051, "uint32"), ("fractions", "float32")],
    ids=["few over 254", "many over 254", "many, one over 65535", "fractions"],
)
def test_counts_are_stored_as_narrow_as_they_go(large, dtype, made, save, tmp_path):
    random = np.random.default_rng(3)
    counts = made.counts(60, 300)
    if large == "fractions":
        counts *= np.float32(0.77)
        counts[:, 1] += np.float32(0.123)
        counts[:, 2] += random.uniform(0, 2, 60).astype(np.float32)
    else:
        counts = np.minimum(counts, 254)
        stored = np.flatnonzero(counts)
        counts.flat[random.choice(stored, int(large * len(stored)), replace=False)] = 300
        counts.flat[stored[0]] = 255
        if dtype == "uint32":
            counts.flat[stored[1]] = 70_000
        counts[:, 3] = random.integers(1, 100, 60)
        counts[:, 3][::7] = 1
    path = save(counts)
    convert(path, tmp_path / "store", **ALLOWED)
    stored_counts = np.load(tmp_path / "store/shards/00000/counts.npy", mmap_mode="r")
    assert stored_counts.dtype == dtype
    overflow = tmp_path / "store/shards/00000/overflow_values.npy"
    assert overflow.exists() == (dtype == "uint8")
    np.testing.assert_array_equal(CellStore.open(tmp_path / "store").rows(slice(None)).toarray(), counts)


def test_a_file_without_cells_that_count_is_refused(save, made, counts, tmp_path):
    obs = pd.DataFrame({"is_primary_data": [False] * 60}, index=[f"c{i}" for i in range(60)])
    path = save(made.anndata(counts, obs=obs))
    with pytest.raises(DataError, match="no cell left to convert; --all-cells"):
        convert(path, tmp_path / "store", **ALLOWED)
    assert not (tmp_path / "store").exists()
    assert convert(path, tmp_path / "store", all_cells=True, **ALLOWED).cells == 60


def test_copies_of_other_data_sets_cells_are_skipped_and_reported(save, made, counts, tmp_path):
    primary = np.arange(60) % 4 > 0
    obs = pd.DataFrame({"is_primary_data": primary}, index=[f"c{i}" for i in range(60)])
    report = convert(save(made.anndata(counts, obs=obs)), tmp_path / "store", **ALLOWED)
    store = CellStore.open(tmp_path / "store")
    assert "15 cells with is_primary_data == False skipped" in report.sources[0].notes
    assert (report.sources[0].rows, report.sources[0].cells) == (60, 45)
    np.testing.assert_array_equal(store.rows(slice(None)).toarray(), counts[primary])
    assert list(store.obs.index) == [f"c{i}" for i in np.flatnonzero(primary)]
