# SPDX-License-Identifier: Apache-2.0
"""Steps that would spoil a run are skipped, on all ranks alike and again after a resume, or end it."""

import csv
import math
import shutil

import checkpoint_jobs
import numpy as np
import pytest
from runs import TINY, checkpoints, differing, metrics, tensors

from megacell.training.run.guard import Guard

STEPS = 9


def guard(**changes) -> Guard:
    return Guard(**{"loss": 5.0, "grad_norm": 10.0, "window": 4, "stop_after": 3, **changes})


@pytest.mark.parametrize(
    ("loss", "norm", "named"),
    [
        (math.nan, 1.0, "loss is nan"),
        (math.inf, 1.0, "loss is inf"),
        (6.0, math.nan, "gradient norm is nan"),
        (31.0, 1.0, "loss is 31, over 5 times the usual 6"),
        (6.0, 11.0, "gradient norm is 11, over 10 times the usual 1"),
    ],
)
def test_a_step_is_skipped_when(loss, norm, named):
    judge = guard()
    assert not any(judge.judge(6.0, 1.0) for _ in range(4))
    assert named in judge.judge(loss, norm)
    assert judge.judge(29.0, 9.0) is None


def test_before_the_window_is_full_only_what_is_not_finite_is_skipped():
    judge = guard()
    assert judge.judge(1.0, 1.0) is None
    assert judge.judge(100.0, 100.0) is None
    assert judge.judge(math.nan, 1.0)


def test_without_factors_only_what_is_not_finite_is_skipped():
    judge = guard(loss=None, grad_norm=None)
    assert not any(judge.judge(loss, loss) for loss in (1.0, 1.0, 1.0, 1.0, 1e9))
    assert judge.judge(1.0, math.inf)


def test_what_was_skipped_does_not_shift_what_is_usual_and_a_step_in_between_starts_the_count_anew():
    judge = guard()
    for _ in range(4):
        judge.judge(6.0, 1.0)
    for _ in range(2):
        assert judge.judge(1000.0, 1.0)
    assert not judge.exhausted
    assert judge.judge(6.0, 1.0) is None
    assert not any((judge.judge(1000.0, 1.0), judge.exhausted)[1] for _ in range(2))
    assert judge.judge(1000.0, 1.0)
    assert judge.exhausted


def test_gradients_that_overflowed_in_16_bits_are_left_to_the_loss_scale_but_a_loss_that_did_is_not():
    judge = guard()
    assert judge.judge(6.0, math.inf, overflow=True) is None
    assert not judge.usual["loss"]
    assert judge.judge(math.nan, math.inf, overflow=True)


def test_a_guard_that_goes_on_judges_as_the_one_that_was_saved():
    first, second = guard(), guard()
    for loss in (6.0, 5.0, 4.0, math.nan, 3.0, math.nan):
        first.judge(loss, 1.0)
    second.restore(first.state())
    for figures in ((21.0, 1.0), (22.6, 1.0), (math.nan, 1.0)):
        assert first.judge(*figures) == second.judge(*figures)
    assert first.state() == second.state()
    assert first.skipped == 2


# in a run


@pytest.fixture(scope="module")
def settings(store, vocabulary) -> list[str]:
    """A short run of two data parallel ranks that saves after every step."""
    short = (f"steps={STEPS}", "validation.every=100", "checkpoint.every=1", "checkpoint.keep=99", "checkpoint.best=0")
    return [f"store={store}", f"vocabulary={vocabulary}", *TINY, *short, "guard.window=3", "guard.stop_after=3"]


def skipped(run) -> list[dict[str, str]]:
    with open(run / "skipped.csv", newline="") as file:
        return list(csv.DictReader(file))


NAN, EXPLODING = 4, 6  # steps, counted from 0: one has gradients that are not finite, one far too large


@pytest.fixture(scope="module")
def spoilt(settings, two_ranks, made):
    """A run with one step of NaN and one that explodes, both on the second rank only; and what rank 0 printed."""
    run = made / "spoilt"
    ((code, out), _) = two_ranks.run(
        checkpoint_jobs.pretrain, [*settings, f"out={run}"], {NAN: math.nan, EXPLODING: 1e4}
    )
    assert code == 0
    return run, out


def test_spoilt_steps_are_skipped_and_change_nothing(spoilt):
    run, _ = spoilt
    for step in range(1, STEPS):
        before, after = (tensors(run / "checkpoints" / f"step-{number:08d}") for number in (step, step + 1))
        changed = list(differing(before, after))
        assert bool(changed) == (step not in (NAN, EXPLODING)), (step, changed)
        assert all(np.isfinite(tensor).all() for tensor in after.values())


def test_the_log_and_skipped_csv_name_the_cells_of_skipped_steps(spoilt):
    run, out = spoilt
    nan, exploding = skipped(run)
    assert (nan["step"], exploding["step"]) == (str(NAN + 1), str(EXPLODING + 1))
    assert nan["reason"] == "its loss is nan"
    assert exploding["reason"].startswith("its loss is ")
    assert "over 5 times the usual" in exploding["reason"]
    for row in (nan, exploding):
        cells = row["cells"].split()
        assert len(set(cells)) == 8, "the cells of both ranks"
        assert f"step {row['step']} skipped: {row['reason']}; cells {', '.join(cells)}" in out


def test_metrics_tell_of_spikes_and_skipped_steps(spoilt):
    rows = metrics(spoilt[0])
    assert [row["skipped"] for row in rows] == ["1" if step in (NAN, EXPLODING) else "0" for step in range(STEPS)]
    assert rows[NAN]["loss"] == "nan"
    assert float(rows[EXPLODING]["loss_spike"]) > 1000
    assert float(rows[EXPLODING]["grad_norm_spike"]) > 1000
    assert 0.5 < float(rows[-1]["loss_spike"]) < 2


@pytest.mark.parametrize("saved", [NAN, EXPLODING - 1, EXPLODING])
def test_a_run_that_goes_on_skips_the_same_steps_and_ends_the_same(saved, spoilt, two_ranks, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(spoilt[0], run)
    for step in checkpoints(run):
        if step > saved:
            shutil.rmtree(run / "checkpoints" / f"step-{step:08d}")
    two_ranks.run(checkpoint_jobs.pretrain, [f"out={run}", "resume=true"], {NAN: math.nan, EXPLODING: 1e4})
    assert skipped(run) == skipped(spoilt[0])
    same = ("step", "loss", "grad_norm", "loss_spike", "grad_norm_spike", "skipped")
    assert [[row[name] for name in same] for row in metrics(run)] == [
        [row[name] for name in same] for row in metrics(spoilt[0])
    ]
    last = f"checkpoints/step-{STEPS:08d}"
    assert not list(differing(tensors(run / last), tensors(spoilt[0] / last)))


def test_skipped_steps_in_a_row_end_the_run_with_its_checkpoints_kept(settings, two_ranks, tmp_path):
    run = tmp_path / "run"
    words = [*settings, f"out={run}"]
    with pytest.raises(AssertionError, match="all steps from 1 to 3 were skipped"):
        two_ranks.run(checkpoint_jobs.pretrain, words, dict.fromkeys(range(STEPS), math.nan))
    assert checkpoints(run) == [1, 2]
    assert [row["step"] for row in skipped(run)] == ["1", "2", "3"]
    before, after = (tensors(run / "checkpoints" / f"step-{number:08d}") for number in (1, 2))
    assert not list(differing(before, after))
    (averages,) = {name for name in after if name.endswith("exp_avg.embedding.word_embeddings.weight")}
    assert not after[averages].any()
