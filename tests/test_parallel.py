# SPDX-License-Identifier: Apache-2.0
"""However a step is spread over ranks, it is the same step."""

import numpy as np
import pytest

import jobs
from megacell.geneformer.training import checkpoint


@pytest.fixture(scope="module")
def reference(one_rank):
    """Losses and gradients of one process."""
    return one_rank.run(jobs.losses_and_gradients, 1)[0]


@pytest.mark.parametrize("tensor", [2, 1], ids=["tensor parallel 2", "data parallel 2"])
def test_losses_and_every_reduced_gradient_equal_those_of_one_process(two_ranks, reference, tensor):
    losses, gradients = reference
    for their_losses, their_gradients in two_ranks.run(jobs.losses_and_gradients, tensor):
        np.testing.assert_allclose(their_losses, losses, rtol=1e-5)
        for step, (theirs, ours) in enumerate(zip(their_gradients, gradients, strict=True)):
            assert theirs.keys() == ours.keys()
            for name, gradient in ours.items():
                scale = np.abs(gradient).max()
                assert scale > 0, f"{name} has no gradient"
                np.testing.assert_allclose(
                    theirs[name], gradient, atol=1e-4 * scale, rtol=0, err_msg=f"step {step}, {name}"
                )


def test_the_loss_falls(reference):
    losses, _ = reference
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("tensor", [2, 1], ids=["tensor parallel 2", "data parallel 2"])
def test_a_run_with_dropout_goes_on_from_a_checkpoint_bit_for_bit(two_ranks, tmp_path, tensor):
    whole = two_ranks.run(jobs.train_with_dropout, tensor, 12, str(tmp_path), 6)
    saved, passed_over = checkpoint.newest(tmp_path)
    assert saved is not None
    assert not passed_over
    resumed = two_ranks.run(jobs.train_with_dropout, tensor, 12, None, None, str(saved))
    for all_losses, later_losses in zip(whole, resumed, strict=True):
        assert later_losses == all_losses[6:]


def test_dropout_differs_between_data_parallel_ranks_but_not_between_runs(two_ranks):
    first = two_ranks.run(jobs.train_with_dropout, 1, 3)
    again = two_ranks.run(jobs.train_with_dropout, 1, 3)
    assert first == again
    assert first[0] != first[1]
