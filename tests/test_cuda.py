# SPDX-License-Identifier: Apache-2.0
"""On a GPU a run and what comes of it are those of a CPU, but for rounding."""

from functools import cache

import numpy as np
import pytest
from runs import TINY, fine, metrics

pytestmark = pytest.mark.cuda
STEPS = 12


def losses(run) -> np.ndarray:
    """Return a run's losses, held-out ones last."""
    rows = metrics(run)
    return np.array([float(row["loss"]) for row in rows] + [float(rows[-1]["held_out_loss"])])


@pytest.fixture(scope="module")
def train(store, vocabulary, tmp_path_factory):
    """Train without dropout, in each way once; returns the run's folder."""

    @cache
    def train(*choices, gpu=True):
        run = tmp_path_factory.mktemp("runs") / "run"
        every = (f"steps={STEPS}", "checkpoint.every=6", "validation.every=12")
        with pytest.MonkeyPatch.context() as patch:
            if not gpu:
                patch.setenv("CUDA_VISIBLE_DEVICES", "")
            given = (f"store={store}", f"vocabulary={vocabulary}", f"out={run}", *TINY, *every, *choices)
            printed = fine("pretrain", *given)
        assert f"parallel on {'cuda' if gpu else 'cpu'};" in printed
        return run

    return train


@pytest.fixture(scope="module")
def on_the_cpu(train):
    """Losses to compare with."""
    return losses(train(gpu=False))


@pytest.mark.parametrize(
    "choices",
    [("fp32",), ("fp32", "compile=true"), ("fp32", "attention=padded"), ("fp32", "parallel.recompute=full"), ("bf16",),
     ("bf16", "attention=efficient"), ("fp16",)],
    ids=", ".join,
)  # fmt: skip
def test_losses_are_those_of_a_cpu(gpus, train, on_the_cpu, choices):
    precision, *others = choices
    ours = losses(train(f"precision={precision}", *others))
    np.testing.assert_allclose(ours, on_the_cpu, rtol=1e-4 if precision == "fp32" else 1e-2)


@pytest.mark.parametrize("choices", [(), ("parallel.tensor=2",)], ids=["data parallel", "tensor and sequence parallel"])
def test_two_gpus_have_the_losses_of_one(gpus, train, choices):
    if gpus < 2:
        pytest.skip("one CUDA device only")
    np.testing.assert_allclose(losses(train("devices=2", *choices)), losses(train()), rtol=1e-4)


def test_a_model_from_a_gpu_embeds_on_either_alike(gpus, train, store, tmp_path, monkeypatch):
    run = train()
    for name in ("gpu", "cpu"):
        if name == "cpu":
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
        fine("embed", run, store, "--out", tmp_path / f"{name}.npy")
    ours, theirs = (np.load(tmp_path / f"{name}.npy") for name in ("gpu", "cpu"))
    np.testing.assert_allclose(ours, theirs, atol=1e-3 * np.abs(theirs).max(), rtol=0)
