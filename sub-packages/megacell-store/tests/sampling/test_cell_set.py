# SPDX-License-Identifier: Apache-2.0
"""Sets of cells: bitmaps that are indexed like arrays, and chosen by metadata."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from megacell.core.errors import DataError, UsageError
from megacell.store.sampling import cell_set as module
from megacell.store.sampling.cell_set import CellSet, choose_cells


class TestCellSet:
    """A bitmap that is indexed like an array."""

    @given(mask=arrays(bool, st.integers(1, 3000), elements=st.booleans()), data=st.data())
    def test_it_holds_the_cells_of_its_mask(self, mask, data):
        cells, expected = CellSet.of(mask), np.flatnonzero(mask)
        assert len(cells) == len(expected)
        assert np.array_equal(cells[:], expected)
        places = data.draw(st.lists(st.integers(0, max(len(expected) - 1, 0)), max_size=20)) if len(expected) else []
        assert cells[np.array(places, int)].tolist() == expected[places].tolist()
        lengths = data.draw(arrays(np.uint16, len(mask), elements=st.integers(0, 2)))
        assert np.array_equal(cells.having(lengths)[:], np.flatnonzero(mask & (lengths > 0)))

    def test_a_place_beyond_its_end_is_refused(self):
        with pytest.raises(IndexError, match="outside the 2 cells"):
            CellSet.of(np.array([True, False, True]))[np.array([2])]

    def test_lengths_are_looked_at_part_by_part(self, monkeypatch):
        monkeypatch.setattr(module, "CELLS_AT_ONCE", 64)
        mask, lengths = np.arange(1000) % 3 > 0, np.arange(1000) % 5
        assert np.array_equal(CellSet.of(mask).having(lengths)[:], np.flatnonzero(mask & (lengths > 0)))


@pytest.fixture
def store(made_up):
    """300 cells of 20 genes: donors a (200), b (60), c (30), without (10); two sources."""
    rng = np.random.default_rng(0)
    donors = ["a"] * 200 + ["b"] * 60 + ["c"] * 30 + [None] * 10
    return made_up(rng.poisson(1.0, (300, 20)) + 1, donors=donors, sources=["x"] * 150 + ["y"] * 150)


class TestChoosing:
    """Cells by their metadata."""

    def test_values_are_taken_in_and_left_out(self, store):
        chosen = choose_cells(store, 'source == "y"', exclude={"donor_id": ["a", "c"]})
        assert chosen[:].tolist() == [*range(200, 260), *range(290, 300)]

    def test_the_choice_is_mapped_from_the_cache_the_second_time(self, store, cache, monkeypatch):
        first = choose_cells(store, exclude={"donor_id": ["a"]})[:]
        monkeypatch.setattr(store, "obs_slice", None)
        again = choose_cells(store, exclude={"donor_id": ["a"]})
        assert isinstance(again.bits, np.memmap)
        assert np.array_equal(again[:], first)

    def test_a_value_that_no_cell_has_is_refused(self, store):
        with pytest.raises(UsageError, match="no cell has 'd' in obs column donor_id"):
            choose_cells(store, exclude={"donor_id": ["d"]})

    def test_a_choice_of_nothing_is_refused(self, store):
        with pytest.raises(DataError, match="no cell is left"):
            choose_cells(store, "source == 'x' and donor_id == 'c'")

    @pytest.mark.parametrize(
        ("choice", "message"),
        [
            ({"exclude": {"colour": ["red"]}}, "no obs column 'colour'; there are source, donor_id"),
            ({"where": "colour == 'red'"}, "there is no column 'colour'; columns are source, donor_id"),
            ({"where": "donor_id"}, "is no condition on cells"),
        ],
        ids=["a column to exclude", "a column of the query", "a query that is none"],
    )
    def test_a_choice_that_cannot_be_meant_is_refused(self, choice, message, store):
        with pytest.raises(UsageError, match=message):
            choose_cells(store, **choice)
