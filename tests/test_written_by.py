# SPDX-License-Identifier: Apache-2.0
"""What an earlier version wrote still opens, and gives what that version found with it.

Another CPU, or another number of threads, changes a loss by 1e-7 relatively and less.
"""

import json
import shutil
from pathlib import Path

import pytest
from runs import figures, fine

WRITTEN = Path(__file__).parent / "written_by_0_1_0"
STORE, RUN = WRITTEN / "store", WRITTEN / "run"
EXPECTED = json.loads((WRITTEN / "expected.json").read_text())
TOLERANCE = 1e-6


@pytest.fixture(autouse=True)
def on_a_cpu(monkeypatch):
    """As the figures were found: on a GPU, dropout draws other numbers."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")


def assert_evaluates(model: Path, name: str) -> None:
    """Assert that a model has the held-out loss that was written down."""
    row = json.loads(fine("evaluate", model, STORE, "--json"))["rows"][0]
    found = {"cells": row["cells"], "masked_genes": row["masked_genes"], "loss": row["model"][0]}
    assert found == pytest.approx(EXPECTED[name], rel=TOLERANCE)


def test_a_nemo_file_has_the_loss_it_had():
    assert_evaluates(WRITTEN / "model.nemo", "model.nemo")


def test_a_checkpoint_has_the_loss_it_had():
    assert_evaluates(RUN / "checkpoints" / "step-00000004", "checkpoint")


def test_a_run_goes_on_as_it_did(tmp_path):
    run = tmp_path / "run"
    shutil.copytree(RUN, run)
    fine("pretrain", f"out={run}", "resume=true", "steps=6", f"store={STORE}", f"vocabulary={run / 'vocabulary'}")
    before, rows = figures(RUN), figures(run)
    for row, old in zip(rows[:-2], before, strict=True):
        assert row.items() >= old.items()  # there may be new columns
    for row, expected in zip(rows[-2:], EXPECTED["resumed"], strict=True):
        found = {name: float(row[name]) for name in expected}
        assert found == pytest.approx(expected, rel=TOLERANCE)
