# SPDX-License-Identifier: Apache-2.0
"""The options about cells and masks, from the command line to what a step of real cells holds."""

import shutil
from dataclasses import replace

import anndata
import numpy as np
import pytest
from scipy.stats import binom

from megacell.core.errors import DataError, UsageError
from megacell.geneformer.pretraining.data import TrainingData
from megacell.geneformer.pretraining.frequency_baselines import fit_frequencies, frequency_losses
from megacell.geneformer.tokens.token_dataset import TokenFolder, open_cells
from megacell.geneformer.tokens.tokenize import tokenize
from megacell.geneformer.vocabulary.vocabulary import Vocabulary
from megacell.store import CellStore, convert
from megacell.store.sampling.split import SplitSettings, split_cells
from megacell.training.config.settings import compose
from megacell.training.run.recorded import open_recorded, store_record

BY_CELL = ("data.split.by=cell", "data.split.holdout=0.1")


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    """One cache for all tests of this file: token counts of the real cells are worked out once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MEGACELL_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def vocabulary(published):
    """Geneformer's second, without the aliases, whose look-up takes longest."""
    return replace(published["V2"], aliases={})


@pytest.fixture
def settings(real_store, vocabulary, monkeypatch):
    """Compose the options of a run over the real cells."""
    monkeypatch.setattr(Vocabulary, "open", lambda path: vocabulary)

    def make(*options, store=real_store.path):
        return compose([f"store={store}", "vocabulary=v2", "out=run", "batch.cells=64", *BY_CELL, *options])

    return make


@pytest.fixture
def opened(settings):
    """Open the data of a run with options."""
    return lambda *options, **given: TrainingData.open(settings(*options, **given))


def recorded(path, vocabulary, record):
    """Open cells as a record of them has them."""
    return open_recorded(path, record, lambda path, generation: open_cells(path, vocabulary, generation))


def cells_of(stream, steps):
    return np.concatenate([batch.cells for k in steps for batch in stream.step(k)])


def within(found, n, share):
    low, high = binom.interval(1 - 1e-9, n, share)
    return low <= found <= high


class TestChoice:
    """data.where and data.exclude."""

    def test_a_run_sees_chosen_cells_alone_and_the_split_stays(self, opened, real_store):
        everything = opened()
        query = 'data.where=cell_type == cell_type and source != "pbmc5k_protein"'
        data = opened(query, "data.exclude={cell_type:[NK,B]}")
        kinds = real_store.obs["cell_type"].astype(object).to_numpy()
        wanted = np.isin(kinds, ["T_CD4", "T_CD8", "MNP"]) & (real_store.obs["source"] != "pbmc5k_protein").to_numpy()
        assert data.train[:].tolist() == [c for c in everything.train[:].tolist() if wanted[c]]
        assert data.validation.tolist() == [c for c in everything.validation.tolist() if wanted[c]]
        assert set(cells_of(data.stream(), range(60))) == set(data.train[:].tolist())
        held_out = data.stream(held_out=True)
        assert set(cells_of(held_out, range(held_out.steps_per_epoch))) == set(data.validation.tolist())
        line = (
            f"leave {wanted.sum():,} of 2,370 cells: {len(data.train):,} to train on, {len(data.validation):,} held out"
        )
        assert any(line in said for said in data.lines)

    def test_one_value_needs_no_list(self, opened):
        one, listed = opened("data.exclude={cell_type:B}"), opened("data.exclude={cell_type:[B]}")
        assert one.train[:].tolist() == listed.train[:].tolist()

    @pytest.mark.parametrize(
        ("option", "error", "message"),
        [
            ("data.where=colour == 1", UsageError, "there is no column 'colour'.*columns are .*cell_type"),
            ("data.where=cell_type ==", UsageError, "the query 'cell_type ==' fails"),
            ("data.where=cell_type == 'none'", DataError, "no cell is left by"),
            ("data.exclude={colour:[red]}", UsageError, "no obs column 'colour'; there are .*cell_type"),
            ("data.exclude={cell_type:[Q]}", UsageError, "no cell has 'Q' in obs column cell_type"),
            ("data.exclude={source:[pbmc4k_a,pbmc4k_b,pbmc5k_protein]}", DataError, "no cell is left by"),
            ("data.balance=colour", UsageError, "no obs column 'colour'"),
            ("data.split.by=colour", UsageError, "has no column 'colour' in obs"),
            ("data.split.holdout=0", DataError, "0 held out .*change data.where, data.exclude, data.split"),
        ],
        ids=lambda value: value if isinstance(value, str) else "",
    )
    def test_what_cannot_be_meant_is_refused(self, option, error, message, opened):
        with pytest.raises(error, match=message):
            opened(option)

    def test_balance_of_one_value_is_refused(self, opened):
        with pytest.raises(UsageError, match=r"data.balance=cell_type: all \d+ cells to train on have one value"):
            opened("data.where=cell_type == 'B'", "data.balance=cell_type")


class TestOrder:
    """data.balance and data.order."""

    def test_balanced_groups_come_equally_often_within_exact_bounds(self, opened, real_store):
        data = opened("data.balance=cell_type")
        kinds = real_store.obs["cell_type"].astype(object).to_numpy()
        sizes = {kind: int(sum(kinds[data.train[:]] == kind)) for kind in ("T_CD4", "MNP", "T_CD8", "B", "NK")}
        without = len(data.train) - sum(sizes.values())
        drawn = kinds[cells_of(data.stream(), range(100))]
        for kind in sizes:
            assert within((drawn == kind).sum(), 6400, 1 / 6)
        assert within(sum(isinstance(kind, float) for kind in drawn), 6400, 1 / 6)
        effective = 36 / sum(1 / size for size in (*sizes.values(), without)) / len(data.train)
        line = f"balanced by cell_type: 6 groups (the {without} without a value are one)"
        assert line in data.lines[-1]
        assert f"cells to train on is {effective:.1%}" in data.lines[-1]

    def test_blocks_go_through_every_cell_once_and_stay_near(self, opened):
        data = opened("data.order=blocks", "data.block=32", "data.blocks=2")
        cells = cells_of(data.stream(), range(len(data.train) // 64))
        assert len(set(cells.tolist())) == len(cells)
        place = np.searchsorted(data.train[:], cells[:64])  # the first window: two blocks of 32 neighbours
        assert len(set((place // 32).tolist())) == 2
        assert "blocks of 32 neighbouring cells, the cells of 2 shuffled together" in data.lines[-1]

    def test_validation_is_not_drawn_but_gone_through(self, opened):
        one, other = opened(), opened("data.balance=cell_type")
        assert one.validation.tolist() == other.validation.tolist()


class TestTheTest:
    """Cells that data.split.test keeps."""

    def test_no_stream_and_no_baseline_looks_at_them(self, opened, real_store, monkeypatch):
        data = opened("data.split.test=0.2")
        split = split_cells(real_store, SplitSettings("cell", 0.1, 0, 0.2))
        assert split.test.sum() > 400
        read = []
        gather, in_place = CellStore.gather, CellStore.rows_in_place
        monkeypatch.setattr(CellStore, "gather", lambda store, cells, **more: (
            read.extend(np.asarray(cells).tolist()) or gather(store, cells, **more)
        ))  # fmt: skip
        monkeypatch.setattr(CellStore, "rows_in_place", lambda store, cells: (
            read.extend(np.asarray(cells).tolist()) or in_place(store, cells)
        ))  # fmt: skip
        frequency = fit_frequencies(data, 10**6)
        frequency_losses(frequency, data)
        cells_of(data.stream(), range(2 * data.stream().steps_per_epoch))
        known = data.lengths > 0
        assert set(read) == set(np.flatnonzero((split.train | split.validation) & known).tolist())

    def test_the_held_out_cells_are_the_same_with_it(self, opened):
        without, with_test = opened(), opened("data.split.test=0.2")
        assert with_test.validation.tolist() == without.validation.tolist()
        assert set(with_test.train[:].tolist()) < set(without.train[:].tolist())
        assert "kept for the test" in with_test.lines[1]


class TestMasks:
    """data.masking.*, on real cells between cls and eos."""

    @pytest.mark.parametrize(
        ("options", "rate", "mask", "random"),
        [
            ((), 0.15, 0.8, 0.1),
            (("data.masking.rate=0.3",), 0.3, 0.8, 0.1),
            (("data.masking.random=0.02",), 0.15, 0.8, 0.02),  # BioNeMo's 80/2/18
            (("data.masking.rate=0.5", "data.masking.mask=0", "data.masking.random=1"), 0.5, 0.0, 1.0),
            (("data.masking.rate=0.1", "data.masking.rate_to=0.3"), None, 0.8, 0.1),
        ],
        ids=["the defaults", "another rate", "80, 2 and 18 %", "random genes alone", "a dynamic rate"],
    )
    def test_shares_are_as_asked_for_and_specials_are_neither_chosen_nor_drawn(
        self, options, rate, mask, random, opened
    ):
        data = opened(*options)
        vocabulary, genes, chosen, masked, changed, rates = data.vocabulary, 0, 0, 0, 0, []
        specials = set(vocabulary.specials.values())
        for batch in data.stream().step(0) + data.stream().step(1):
            ends = batch.cu_seqlens[: len(batch.cells) + 1]
            now = batch.tokens[batch.masked]
            assert not specials & set(batch.labels.tolist())
            assert not (specials - {vocabulary.specials["mask"]}) & set(now.tolist())
            assert (batch.tokens[ends[:-1]] == vocabulary.specials["cls"]).all()
            assert (batch.tokens[ends[1:] - 1] == vocabulary.specials["eos"]).all()
            genes += batch.n_tokens - 2 * len(batch.cells)
            chosen += len(now)
            masked += (now == vocabulary.specials["mask"]).sum()
            changed += ((now != vocabulary.specials["mask"]) & (now != batch.labels)).sum()
            per_cell = np.bincount(np.searchsorted(ends, batch.masked, side="right") - 1, minlength=len(batch.cells))
            rates += (per_cell / (np.diff(ends) - 2)).tolist()
        if rate is not None:
            assert within(chosen, genes, rate)
        else:
            assert min(rates) < 0.15
            assert max(rates) > 0.25
            assert abs(np.mean(rates) - 0.2) < 5 * 0.2 / np.sqrt(12 * len(rates)) + 0.01
        assert within(masked, chosen, mask)
        assert within(changed, chosen, random * (1 - 1 / len(vocabulary.gene_tokens)))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["data.order=random"], "data.order=random: choose one of shuffled, blocks"),
        (["data.order=blocks", "data.balance=cell_type"], "data.balance=cell_type: draws cells one by one"),
        (["data.block=0"], "data.block=0: must be a whole number of at least 1"),
        (["data.threads=-1"], "data.threads=-1: must be a whole number of at least 0"),
        (["data.exclude=[a]"], "give values by column"),
        (["data.masking.rate=1.5"], "masking: rate is 1.5"),
        (["data.masking.rate=often"], "data.masking.rate=often: must be a number"),
        (["data.masking.mask=0.9", "data.masking.random=0.2"], "exceed 1 together"),
        (["data.masking.rate_to=0.1"], "rate_to is 0.1"),
        (["data.split.test=1"], "split: test is 1"),
        (["data.split.holdout=0.5", "data.split.test=0.5"], "leave nothing to train on"),
        (["data.split.seed=true"], "data.split.seed=True: must be a number"),
        (["data.bogus=1"], "bogus"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_options_that_cannot_be_meant_are_refused_before_anything_is_opened(options, says, settings):
    with pytest.raises(UsageError, match=says):
        settings(*options)


class TestAGrownStore:
    """A run goes on with the cells that it was started on."""

    @pytest.fixture
    def grown(self, real_store, data, tmp_path):
        """A copy of the store with 200 cells more, of the donor that is there."""
        shutil.copytree(real_store.path, tmp_path / "store")
        cells = anndata.read_h5ad(data / "cells" / "pbmc4k_a.h5ad")[:200].copy()
        cells.write_h5ad(tmp_path / "more.h5ad")
        convert(tmp_path / "more.h5ad", tmp_path / "store", append=True)
        return tmp_path / "store"

    def test_every_cell_and_every_step_is_as_before(self, opened, settings, grown, real_store):
        options = ("data.balance=cell_type", "data.exclude={cell_type:[NK]}", "data.split.by=donor_id")
        before, other = opened(*options), opened(*options, store=grown)
        after = TrainingData.open(settings(*options, store=grown), store_record(real_store))
        assert after.train[:].tolist() == before.train[:].tolist() != other.train[:].tolist()
        assert after.validation.tolist() == before.validation.tolist()
        assert len(other.store) == 2570
        assert any("the store has grown to 2,570 cells, generation 2" in line for line in after.lines)
        assert not any("grown" in line for line in other.lines)
        for k in (0, 40):
            one, again = before.stream().step(k), after.stream().step(k)
            assert [b.tokens.tolist() for b in one] == [b.tokens.tolist() for b in again]
        state = before.stream().state_dict(40)
        assert after.stream().step_of(state) == 40
        assert all(isinstance(value, int | str) for value in state.values())
        with pytest.raises(UsageError, match="kept with cells"):
            other.stream().step_of(state)

    def test_a_generation_that_is_gone_is_refused(self, vocabulary, grown, real_store):
        (grown / "manifest-1.json").unlink()
        with pytest.raises(DataError, match=r"2,370 cells of generation 1 .* can no longer be opened .*init="):
            recorded(grown, vocabulary, store_record(real_store))

    @pytest.mark.parametrize("change", [{"digest": "0" * 16}, {"digest": "0" * 16, "generation": 2}], ids=str)
    def test_another_store_is_refused(self, change, vocabulary, grown, real_store):
        with pytest.raises(DataError, match=r"has not the 2,370 cells of generation \d that the run was started on"):
            recorded(grown, vocabulary, {**store_record(real_store), **change})

    def test_the_same_store_is_opened_without_a_word(self, vocabulary, real_store):
        store, line = recorded(real_store.path, vocabulary, store_record(real_store))
        assert line is None
        assert store.digest == real_store.digest


def test_of_a_tokenised_corpus_it_is_not_known_what_was_measured(opened, real_store, vocabulary, tmp_path):
    tokenize(real_store, vocabulary, tmp_path / "corpus")
    data = opened("data.where=cell_type != 'B'", "data.balance=cell_type", store=tmp_path / "corpus")
    assert isinstance(data.store, TokenFolder)
    assert "how much of the vocabulary was measured is not known" in data.lines[0]
    assert "100%" not in data.lines[0]
    kinds = data.store.obs_slice()["cell_type"].to_numpy(object)
    assert "B" not in set(kinds[cells_of(data.stream(), range(20))].tolist())
    with pytest.raises(DataError, match="has not"):
        recorded(tmp_path / "corpus", vocabulary, store_record(real_store))
