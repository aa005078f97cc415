# SPDX-License-Identifier: Apache-2.0
"""fp16 and bf16: what is kept in float32, and a loss scale that finds its way."""

import math
from itertools import pairwise

import numpy as np
import pytest

import jobs
from megacell.training.checkpoint import checkpoint


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_the_optimizer_and_the_reduced_gradients_are_float32(one_rank, precision):
    half = {"bf16": "bfloat16", "fp16": "float16"}[precision]
    (found,) = one_rank.run(jobs.dtypes, precision, True)
    assert found == ({half}, {"float32"}, {"float32"})
    (found,) = one_rank.run(jobs.dtypes, precision, False)
    assert found == ({half}, {half}, {"float32"})


@pytest.fixture(scope="module")
def overflowing(one_rank):
    """Steps from a loss scale at which gradients overflow, which may grow again after 8 steps that fit."""
    (seen,) = one_rank.run(jobs.fp16_from_a_scale_too_large, 40, initial_loss_scale=2**24, loss_scale_window=8)
    return seen


def test_a_step_whose_gradients_overflow_changes_no_weight(overflowing):
    first, changed = overflowing[0]
    assert not first.applied
    assert not changed
    assert first.grad_norm == math.inf
    for result, changed in overflowing:
        assert changed == result.applied == math.isfinite(result.grad_norm)


def test_the_loss_scale_falls_until_gradients_fit_and_grows_again(overflowing):
    results = [result for result, _ in overflowing]
    scales = [2**24, *(result.loss_scale for result in results)]
    for (before, after), result in zip(pairwise(scales), results, strict=True):
        assert after in ((before, before * 2) if result.applied else (before, before / 2))
    assert min(scales) < 2**24
    recovered = next(step for step, result in enumerate(results) if result.applied)
    assert 0 < recovered < 20
    assert any(after > before for before, after in pairwise(scales))
    assert sum(result.applied for result in results) > 15


@pytest.mark.parametrize(("precision", "most"), [("fp16", 1e-2), ("bf16", 8e-2)])  # its steps are 8 times coarser
def test_sixteen_bits_follow_float32(one_rank, precision, most):
    (whole, gradients), (half, halved) = (
        one_rank.run(jobs.losses_and_gradients, 1, precision=p, options={"optim": {"initial_loss_scale": 256}})[0]
        for p in ("fp32", precision)
    )
    np.testing.assert_allclose(half, whole, rtol=2e-3)
    for name, gradient in gradients[0].items():
        one = halved[0][name] / (256 if precision == "fp16" else 1)
        distance = np.linalg.norm(one - gradient) / np.linalg.norm(gradient)
        assert distance < most, f"{name}: {distance}"


def test_a_run_saved_before_any_gradient_fitted_goes_on_bit_for_bit(one_rank, tmp_path):
    options = {"optim": {"initial_loss_scale": 2**22}}
    (whole,) = one_rank.run(jobs.train, 1, 18, folder=str(tmp_path), save_at=2, options=options, precision="fp16")
    assert not any(result.applied for result in whole[:2])
    assert any(result.applied for result in whole[2:])
    saved, _ = checkpoint.newest(tmp_path)
    (resumed,) = one_rank.run(jobs.train, 1, 18, load=str(saved), options=options, precision="fp16")
    assert resumed == whole[2:]
