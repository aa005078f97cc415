# SPDX-License-Identifier: Apache-2.0
"""Checkpoints stay that are the newest or of the lowest held-out loss, and the best can be named."""

import json
import math
import shutil

import checkpoint_jobs
import pytest
from runs import TINY, checkpoints, here, metrics, one_line

from megacell.core.errors import DataError
from megacell.training.checkpoint import checkpoint


def make(folder, losses: dict[int, float | None]) -> None:
    """Make checkpoints that hold nothing but their markers."""
    for step, loss in losses.items():
        path = folder / f"step-{step:08d}"
        path.mkdir(parents=True)
        known = {} if loss is None else {"held_out_loss": loss}
        facts = {"format": checkpoint.FORMAT, "version": checkpoint.VERSION, "step": step, "files": {}, **known}
        (path / checkpoint.MARKER).write_text(json.dumps(facts))


LOSSES = {1: 3.0, 2: 2.0, 3: None, 4: 2.5, 5: 2.0, 6: None, 7: 4.0}


@pytest.mark.parametrize(
    ("keep", "best", "stay"),
    [(2, 0, [6, 7]), (1, 1, [5, 7]), (2, 2, [2, 5, 6, 7]), (3, 1, [5, 6, 7]), (1, 9, [1, 2, 4, 5, 7])],
)
def test_the_newest_and_the_best_stay(keep, best, stay, tmp_path):
    make(tmp_path / "checkpoints", LOSSES)
    checkpoint.prune(tmp_path / "checkpoints", keep, best)
    assert checkpoints(tmp_path) == stay


def test_the_best_is_of_the_lowest_loss_and_of_equals_the_newest(tmp_path):
    make(tmp_path, LOSSES)
    assert checkpoint.best(tmp_path).name == "step-00000005"
    assert checkpoint.best_loss(tmp_path) == 2.0


def test_without_a_held_out_loss_there_is_no_best(tmp_path):
    make(tmp_path, {1: None})
    assert checkpoint.best_loss(tmp_path) == math.inf
    with pytest.raises(DataError, match="no checkpoint with a held-out loss"):
        checkpoint.best(tmp_path)


@pytest.fixture(scope="module")
def risen(store, vocabulary, two_ranks, made):
    """A run whose held-out loss falls and, at a learning rate far too high, rises again."""
    run = made / "risen"
    lengths = ("steps=8", "validation.every=1", "checkpoint.every=100", "checkpoint.keep=1", "optim.lr=0.5")
    words = [f"store={store}", f"vocabulary={vocabulary}", *TINY, *lengths, "optim.warmup=4", "guard.loss=null"]
    assert two_ranks.run(checkpoint_jobs.pretrain, [*words, f"out={run}"], {})[0][0] == 0
    return run, [float(row["held_out_loss"]) for row in metrics(run)]


def test_a_run_keeps_its_best_checkpoint_and_its_last(risen):
    run, losses = risen
    best = losses.index(min(losses)) + 1
    assert 1 <= best < 8
    assert checkpoints(run) == [best, 8]
    assert checkpoint.read_facts(checkpoint.best(run / "checkpoints"))["held_out_loss"] == min(losses)


def test_the_best_checkpoint_is_exported_by_name(risen, tmp_path):
    run, losses = risen
    code, out, err = here("export", run / "best", "--to", "nemo", "--out", tmp_path / "best.nemo")
    assert code == 0, err
    assert f"step {losses.index(min(losses)) + 1}," in out


def test_a_damaged_best_is_refused_by_name(risen, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(risen[0], run)
    damaged = checkpoint.best(run / "checkpoints") / "common.pt"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    code, _, err = here("export", run / "best", "--to", "nemo", "--out", tmp_path / "best.nemo")
    assert code == 1
    one_line(err, str(damaged), "damaged")
