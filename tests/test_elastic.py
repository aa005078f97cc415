# SPDX-License-Identifier: Apache-2.0
"""A run that was saved on some layout of ranks goes on, with its optimizer's state, on another."""

import shutil

import checkpoint_jobs
import numpy as np
import pytest
from runs import checkpoints, here, metrics, one_line, tensors

SAVED, LAST = 10, 30
SMALL = 5  # a checkpoint of the session's runs of 12 steps
LAYOUTS = {"tensor parallel 2": ("two_ranks", 2), "data parallel 2": ("two_ranks", 1), "one rank": ("one_rank", 1)}


@pytest.fixture(scope="module")
def train(request):
    """A function that trains on a layout, and returns losses, gradients and buckets as rank 0 saw them."""

    def run(layout: str, *args):
        pool, tensor = LAYOUTS[layout]
        return request.getfixturevalue(pool).run(checkpoint_jobs.train, tensor, *args)[0]

    return run


@pytest.fixture(scope="module", params=LAYOUTS)
def whole(request, train, tmp_path_factory):
    """A run of 30 steps that is never stopped: its layout, folder, losses, and gradients of the step after the 10th."""
    folder = tmp_path_factory.mktemp("whole")
    losses, gradients, _ = train(request.param, 0, LAST, str(folder), SAVED)
    return request.param, folder, losses[SAVED:], gradients


def copy_of(folder, tmp_path) -> str:
    """Copy the checkpoint to go on from into a folder of its own."""
    shutil.copytree(folder / f"step-{SAVED:08d}", tmp_path / f"step-{SAVED:08d}")
    return str(tmp_path)


@pytest.mark.parametrize("after", LAYOUTS)
def test_a_run_goes_on_where_it_was_saved_or_on_another_layout(whole, after, train, tmp_path):
    before, folder, losses, gradients = whole
    moved_losses, moved_gradients, _ = train(after, SAVED, LAST, copy_of(folder, tmp_path), SAVED)
    np.testing.assert_allclose(moved_losses, losses, rtol=0 if before == after else 1e-5)
    assert gradients.keys() == moved_gradients.keys()
    for name, gradient in gradients.items():
        scale = np.abs(gradient).max()
        np.testing.assert_allclose(moved_gradients[name], gradient, atol=1e-5 * scale, rtol=0, err_msg=name)
    ours, theirs = (tensors(where / f"step-{LAST:08d}") for where in (tmp_path, folder))
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        scale = np.abs(tensor).max()
        np.testing.assert_allclose(ours[name], tensor, atol=1e-3 * scale, rtol=0, err_msg=name)


def test_gradients_that_are_reduced_in_several_buckets_do_not_mix_up_what_is_saved(train, tmp_path):
    before = "data parallel 2"
    losses, _, buckets = train(before, 0, LAST, str(tmp_path), SAVED, True)
    assert buckets > 2
    same, other = (copy_of(tmp_path, tmp_path / name) for name in ("same", "other"))
    assert train(before, SAVED, LAST, same, SAVED, True)[0] == losses[SAVED:]
    np.testing.assert_allclose(train("one rank", SAVED, LAST, other, SAVED)[0], losses[SAVED:], rtol=1e-5)


def test_beginning_the_optimizers_state_changes_no_weight_at_any_learning_rate(one_rank):
    before, after = one_rank.run(checkpoint_jobs.begin)[0]
    assert before == after


# a whole run


@pytest.mark.parametrize(
    ("saved", "pool", "layout"),
    [
        ("halves", "one_rank", ["devices=1", "parallel.tensor=1"]),
        pytest.param("halves", "two_ranks", ["parallel.tensor=1"], marks=pytest.mark.exhaustive),
        pytest.param("copies", "two_ranks", ["parallel.tensor=2"], marks=pytest.mark.exhaustive),
    ],
    ids=[
        "tensor parallel 2 to one rank",
        "tensor parallel 2 to data parallel 2",
        "data parallel 2 to tensor parallel 2",
    ],
)
def test_a_run_is_resumed_on_another_layout_by_its_options(saved, pool, layout, request, tmp_path):
    whole, _ = request.getfixturevalue(saved)
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    for step in checkpoints(run):
        if step > SMALL:
            shutil.rmtree(run / "checkpoints" / f"step-{step:08d}")
    (code, out), *_ = request.getfixturevalue(pool).run(
        checkpoint_jobs.pretrain, [f"out={run}", "resume=true", *layout], {}
    )
    assert code == 0
    assert f"resuming at step {SMALL} " in out
    ours, theirs = ([float(row["loss"]) for row in metrics(which)] for which in (run, whole))
    assert ours[:SMALL] == theirs[:SMALL]
    np.testing.assert_allclose(ours, theirs, rtol=1e-5)


@pytest.mark.parametrize("option", ["precision=bf16", "seed=1", "batch.cells=4", "model=tiny", "data.head_bias=false"])
def test_what_makes_a_run_the_run_that_it_is_is_refused_by_name(option, halves):
    code, _, err = here("pretrain", f"out={halves[0]}", "resume=true", option)
    assert code == 2
    one_line(err, f"{option.partition('=')[0]}=…", "start a new one")
