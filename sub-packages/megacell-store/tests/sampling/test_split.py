# SPDX-License-Identifier: Apache-2.0
"""Splits: whole donors, else sources, else cells; duplicates on one side; sides that stay."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megacell.core.errors import DataError, UsageError
from megacell.store.sampling.split import SplitSettings, split_cells


@pytest.fixture
def cells_of(made_up):
    """Make a store of n different cells."""

    def make(n, **columns):
        return made_up(1 + np.arange(n)[:, None] * [[1, 2, 3]] % 251 + np.arange(n)[:, None] // 251, **columns)

    return make


def test_donors_go_first_and_stay_whole(cells_of):
    donors = [f"donor {i % 20}" for i in range(400)]
    split = split_cells(cells_of(400, donors=donors, sources=["a", "b"] * 200), SplitSettings())
    assert split.by == "donor_id"
    held = {donor for donor, out in zip(donors, split.validation, strict=True) if out}
    assert len(held) == 2
    assert split.validation.tolist() == [donor in held for donor in donors]
    assert np.array_equal(split.train, ~split.validation)
    assert split.line == "split by donor_id: 2 of 20 groups held out; 360 cells to train on, 40 held out"


def test_one_donor_falls_back_to_sources_and_the_line_says_why(cells_of):
    sources = [f"{i % 10}.h5ad" for i in range(100)]
    split = split_cells(cells_of(100, donors=["one"] * 100, sources=sources), SplitSettings())
    assert split.by == "source"
    assert "not by donor_id: one group only" in split.line
    assert split.validation.sum() == 10


def test_one_source_falls_back_to_cells(cells_of):
    split = split_cells(cells_of(2000), SplitSettings())
    assert split.by == "cell"
    assert "no such column in obs" in split.line
    assert 130 < split.validation.sum() < 270  # 200 expected, five standard deviations
    assert np.array_equal(split.train, ~split.validation)


def test_groups_that_are_too_large_are_passed_over(cells_of):
    donors = ["large"] * 450 + ["large too"] * 450 + ["small"] * 100
    for seed in range(10):
        split = split_cells(cells_of(1000, donors=donors), SplitSettings(seed=seed))
        assert split.validation.tolist() == [donor == "small" for donor in donors]


def test_two_large_groups_fall_through_to_cells(cells_of):
    split = split_cells(cells_of(1000, donors=["x", "y"] * 500), SplitSettings())
    assert split.by == "cell"
    assert "not by donor_id: 2 groups too large for a share of 0.1" in split.line


@given(
    sizes=st.lists(st.integers(1, 40), min_size=2, max_size=30), holdout=st.floats(0.02, 0.5), seed=st.integers(0, 99)
)
def test_the_share_lies_between_half_and_twice_the_wanted(sizes, holdout, seed, made_up):
    donors = np.repeat([f"d{i}" for i in range(len(sizes))], sizes)
    counts = 1 + np.arange(sum(sizes))[:, None] * [[1, 7]]
    split = split_cells(made_up(counts, donors=donors), SplitSettings(holdout=holdout, seed=seed))
    assert not (split.train & split.validation).any()
    if split.by == "donor_id":
        share = split.validation.mean()
        assert holdout / 2 <= share <= 2 * holdout
        assert not set(donors[split.train]) & set(donors[split.validation])


def test_cells_without_a_donor_go_by_their_source(cells_of):
    donors = [None if i % 4 == 0 else f"d{i % 7}" for i in range(700)]
    sources = [f"s{i % 3}" for i in range(700)]
    split = split_cells(cells_of(700, donors=donors, sources=sources), SplitSettings(holdout=0.2))
    groups = [donor or source for donor, source in zip(donors, sources, strict=True)]
    held = {group for group, out in zip(groups, split.validation, strict=True) if out}
    assert split.by == "donor_id"
    assert split.validation.tolist() == [group in held for group in groups]


@pytest.mark.parametrize("by", ["donor_id", "cell"])
def test_equal_cells_are_never_on_both_sides(by, made_up):
    rng = np.random.default_rng(0)
    counts = rng.integers(1, 4, (600, 3))  # 27 different cells
    store = made_up(counts, donors=[f"d{i % 30}" for i in range(600)])
    split = split_cells(store, SplitSettings(by=by, holdout=0.2))
    assert split.validation.any()
    assert not set(store.cell_hash[split.train]) & set(store.cell_hash[split.validation])
    if by == "donor_id":
        dropped = 600 - split.train.sum() - split.validation.sum()
        assert dropped > 0
        assert f"{dropped} left out as duplicates of held-out ones" in split.line


def test_a_cells_side_stays_when_cells_are_appended(cells_of):
    before = split_cells(cells_of(300), SplitSettings(by="cell", seed=5))
    after = split_cells(cells_of(900), SplitSettings(by="cell", seed=5))
    assert np.array_equal(after.validation[:300], before.validation)
    assert after.validation[300:].any()


def test_the_seed_decides_and_nothing_else(cells_of):
    store = cells_of(1000, donors=[f"d{i % 50}" for i in range(1000)])
    for by in ("donor_id", "cell"):
        sides = [split_cells(store, SplitSettings(by=by, seed=seed)).validation for seed in (0, 0, 1)]
        assert np.array_equal(sides[0], sides[1])
        assert not np.array_equal(sides[0], sides[2])


def test_the_order_of_cells_does_not_decide(made_up):
    counts, donors = 1 + np.arange(400)[:, None] * [[1, 7]], np.array([f"d{i % 20}" for i in range(400)])
    split = split_cells(made_up(counts, donors=donors), SplitSettings())
    turned = split_cells(made_up(counts[::-1], donors=donors[::-1]), SplitSettings())
    assert np.array_equal(turned.validation, split.validation[::-1])


def test_nothing_is_held_out_at_a_share_of_zero(cells_of):
    split = split_cells(cells_of(100), SplitSettings(holdout=0))
    assert split.train.all()
    assert not split.validation.any()


def test_a_level_that_was_asked_for_is_taken_or_refused(cells_of):
    store = cells_of(100, donors=["one"] * 100, sources=[f"s{i % 10}" for i in range(100)])
    assert split_cells(store, SplitSettings(by="source")).by == "source"
    with pytest.raises(DataError, match="split by donor_id: one group only"):
        split_cells(store, SplitSettings(by="donor_id"))
    with pytest.raises(UsageError, match="no column 'tissue' in obs"):
        split_cells(store, SplitSettings(by="tissue"))


@pytest.mark.parametrize("by", ["donor_id", "cell"])
def test_a_test_is_taken_from_the_cells_to_train_on_and_changes_no_validation(by, cells_of):
    store = cells_of(2000, donors=[f"d{i % 50}" for i in range(2000)])
    without, with_test = (split_cells(store, SplitSettings(by=by, test=share)) for share in (0.0, 0.2))
    assert not without.test.any()
    assert np.array_equal(with_test.validation, without.validation)
    assert np.array_equal(with_test.train | with_test.test, without.train)
    assert not (with_test.train & with_test.test).any()
    assert 0.16 < with_test.test.mean() < 0.24  # five standard deviations by cell
    assert f"{with_test.test.sum():,} kept for the test" in with_test.line
    assert "test" not in without.line


@given(
    sizes=st.lists(st.integers(1, 40), min_size=3, max_size=30), holdout=st.floats(0.02, 0.4),
    test=st.floats(0.02, 0.4), seed=st.integers(0, 99),
)  # fmt: skip
def test_no_donor_is_on_two_of_three_sides_and_each_has_its_share(sizes, holdout, test, seed, made_up):
    donors = np.repeat([f"d{i}" for i in range(len(sizes))], sizes)
    counts = 1 + np.arange(sum(sizes))[:, None] * [[1, 7]]
    split = split_cells(made_up(counts, donors=donors), SplitSettings(holdout=holdout, test=test, seed=seed))
    sides = [split.train, split.validation, split.test]
    assert (np.sum(sides, axis=0) == 1).all()
    if split.by == "donor_id":
        found = [set(donors[side]) for side in sides]
        assert sum(map(len, found)) == len(set(donors))
        assert holdout / 2 <= split.validation.mean() <= 2 * holdout
        assert test / 2 <= split.test.mean() <= 2 * test


def test_equal_cells_are_on_one_of_three_sides(made_up):
    counts = np.random.default_rng(0).integers(1, 4, (600, 4))  # 81 different cells
    for by in ("donor_id", "cell"):
        store = made_up(counts, donors=[f"d{i % 60}" for i in range(600)])
        split = split_cells(store, SplitSettings(by=by, holdout=0.1, test=0.1))
        found = [set(store.cell_hash[side].tolist()) for side in (split.train, split.validation, split.test)]
        assert all(found[1:]) or by == "donor_id"
        assert sum(map(len, found)) == len(set.union(*found))


def test_settings_are_kept_by_name_and_a_test_of_none_is_left_out():
    assert SplitSettings().to_dict() == {"by": "auto", "holdout": 0.1, "seed": 0}  # as vocabularies have it
    for settings in (SplitSettings(), SplitSettings("cell", 0.2, 3, 0.1)):
        assert SplitSettings(**settings.to_dict()) == settings


@pytest.mark.parametrize(
    "wrong",
    [{"holdout": 1.0}, {"holdout": -0.1}, {"test": 1.0}, {"holdout": 0.6, "test": 0.4}, {"seed": -1}, {"seed": 2**64}],
    ids=str,
)
def test_settings_out_of_range_are_refused(wrong):
    with pytest.raises(UsageError, match="split"):
        SplitSettings(**wrong)
