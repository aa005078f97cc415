# SPDX-License-Identifier: Apache-2.0
"""A family without genes, tokens or a store is trained by the same code: ranks, kills, moves, guard, sweeps, README."""

import json
import math
import os
import shutil
import signal
import time

import pytest
from runs import Command, checkpoints, differing, figures, fine, here, metrics, one_line, tensors

from megacell.core.errors import UsageError
from megacell.training.family import find_family

STEPS = 12
PATH = "donor=3,b [c] (d) 'ü' e"  # a folder that may be called anything
SETTINGS = (
    "pretrain", "family=toy", f"steps={STEPS}", "batch.cells=8", "log_every=1", "logger=csv", "optim.lr=0.01",
    "validation.every=6", "checkpoint.every=4", "checkpoint.keep=9", "parallel.sequence=false",
)  # fmt: skip


def losses(run, first=1):
    """Return the loss of each step from ``first`` on."""
    return [float(row["loss"]) for row in metrics(run) if int(row["step"]) >= first]


@pytest.fixture(scope="module")
def halves(tmp_path_factory):
    """A run of two tensor parallel ranks with dropout, and what it printed."""
    run = tmp_path_factory.mktemp("toy") / "halves"
    return run, fine(*SETTINGS, "devices=2", "parallel.tensor=2", f"out={run}")


def test_it_learns_and_tells_as_any_run_does(halves):
    run, printed = halves
    assert "made-up numbers of 4 features" in printed
    assert "1 data x 2 tensor parallel on cpu; dropout 0.1" in printed
    summary = json.loads((run / "summary.json").read_text())
    assert f"held-out loss {summary['held_out_loss']:.3f} squared units (zero {summary['zero']:.3f})" in printed
    assert summary["step"] == STEPS
    assert summary["finished"]
    assert summary["held_out_loss"] < summary["zero"]
    assert {4, 8, 12} <= set(checkpoints(run))
    facts = json.loads((run / "checkpoints/step-00000012/checkpoint.json").read_text())
    assert facts["family"] == "toy"
    assert facts["network"] == {"hidden": 16, "dropout": 0.1}
    assert (run / "inputs.txt").read_text() == "made up\n"


def test_the_readme_of_its_run_names_nothing_of_another_family(halves):
    text = (halves[0] / "README.md").read_text()
    assert f"| look at it | `ls {halves[0]}` |" in text
    assert "| `inputs.txt` | where the numbers come from |" in text
    assert "Made-up numbers." in text
    assert "vocabulary" not in text
    assert "gene" not in text.lower()


def test_its_processes_import_nothing_of_another_family(tmp_path):
    code = (
        "import sys; from megacell.core.cli.main import main; main(sys.argv[1:]);"
        "print([m for m in sys.modules if m.startswith('megacell.geneformer.') and '.commands' not in m])"
    )
    printed = fine(*SETTINGS, "steps=2", f"out={tmp_path / 'run'}", "model.dropout=0", script=("-c", code))
    assert printed.strip().splitlines()[-1] == "[]"


def test_two_data_parallel_ranks_compute_what_one_does(tmp_path):
    for devices in (1, 2):
        run = tmp_path / str(devices)
        fine(*SETTINGS, "model.dropout=0", "steps=6", f"devices={devices}", f"out={run}")
    one, two = losses(tmp_path / "1"), losses(tmp_path / "2")
    assert two == pytest.approx(one, rel=1e-5)


def test_killed_under_two_tensor_parallel_ranks_it_goes_on_to_the_same_bits(halves, tmp_path):
    run = tmp_path / PATH
    layout = ("devices=2", "parallel.tensor=2")
    command = Command(*SETTINGS, *layout, "data.delay=0.5", f"out={run}")
    end = time.monotonic() + 200
    while not (run / "checkpoints/step-00000004/checkpoint.json").exists():
        assert command.process.poll() is None, command.end()
        assert time.monotonic() < end, "no checkpoint was written"
        time.sleep(0.05)
    for pid in command.family():
        os.kill(pid, signal.SIGKILL)
    command.end()
    assert checkpoints(run)[-1] < STEPS, "it was too fast to be killed"

    moved = tmp_path / "moved"
    shutil.copytree(run, moved)
    fine("pretrain", f"out={run}", "resume=true", "data.threads=0")
    assert not differing(*(tensors(each / f"checkpoints/step-{STEPS:08d}") for each in (halves[0], run)))
    assert figures(run) == figures(halves[0])

    fine("pretrain", f"out={moved}", "resume=true", "devices=1", "parallel.tensor=1")
    assert losses(moved) == pytest.approx(losses(halves[0]), rel=1e-4)


def test_a_sweep_whose_runs_skip_a_spike(tmp_path):
    out = tmp_path / "a, {b}" / PATH
    out.parent.mkdir()
    fine(SETTINGS[0], "--multirun", *SETTINGS[1:], "guard.window=3", "data.spike_at=8", "seed=0,1", f"out={out}")
    for run in (out / "0", out / "1"):
        skipped = (run / "skipped.csv").read_text().splitlines()
        assert len(skipped) == 2
        assert skipped[1].startswith("8,")
        assert skipped[1].endswith(" ".join(map(str, range(56, 64))))
        assert math.isfinite(json.loads((run / "summary.json").read_text())["held_out_loss"])


def test_a_family_that_is_not_installed_is_named():
    with pytest.raises(UsageError, match="family=neither: not installed; choose one of: geneformer, toy"):
        find_family("neither")
    code, _, err = here("pretrain", "family=neither", "out=nowhere")
    assert code == 2
    one_line(err, "family=neither")


@pytest.mark.parametrize(("option", "words"), [("vocabulary=v", "vocabulary"), ("model.hidden=3", "parallel.tensor")])
def test_options_of_its_own_are_checked_before_anything_starts(option, words, tmp_path):
    code, _, err = here(*SETTINGS, "devices=2", "parallel.tensor=2", option, f"out={tmp_path / 'run'}")
    assert code == 2
    one_line(err, words)
    assert not (tmp_path / "run").exists()
