# SPDX-License-Identifier: Apache-2.0
"""However a step is spread over ranks, packed, or kept in memory, it is the same step."""

import numpy as np
import pytest

import jobs
from megacell.training.checkpoint import checkpoint

NETWORKS = {
    "pre-LN, GELU, tied": {},
    "post-LN, ReLU, untied": {"norm": "post", "activation": "relu", "tied_head": False, "scaled_init": False},
}
LAYOUTS = {
    "tensor parallel 2": (2, {}),
    "tensor and sequence parallel 2": (2, {"sequence": True}),
    "data parallel 2": (1, {}),
}


@pytest.fixture(scope="module", params=NETWORKS.values(), ids=NETWORKS.keys())
def network(request):
    """What is changed of the jobs' network."""
    return request.param


@pytest.fixture(scope="module")
def reference(one_rank, network):
    """Losses and gradients of one process."""
    return one_rank.run(jobs.losses_and_gradients, 1, network=network)[0]


def same(theirs, ours, *, losses: float = 1e-5, gradients: float = 1e-4):
    """Assert that two runs' losses agree relatively, and every gradient as a share of its largest value."""
    np.testing.assert_allclose(theirs[0], ours[0], rtol=losses)
    for step, (one, other) in enumerate(zip(theirs[1], ours[1], strict=True)):
        assert one.keys() == other.keys()
        for name, gradient in other.items():
            scale = np.abs(gradient).max()
            assert scale > 0, f"{name} has no gradient"
            np.testing.assert_allclose(
                one[name], gradient, atol=gradients * scale, rtol=0, err_msg=f"step {step}, {name}"
            )


@pytest.mark.parametrize(("tensor", "layout"), LAYOUTS.values(), ids=LAYOUTS.keys())
def test_losses_and_every_reduced_gradient_equal_those_of_one_process(two_ranks, reference, network, tensor, layout):
    for theirs in two_ranks.run(jobs.losses_and_gradients, tensor, network=network, **layout):
        same(theirs, reference)


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    ("tensor", "layout"),
    [(2, {"sequence": True, "recompute": "full"}), (1, {})],
    ids=["tensor and sequence parallel 2, recomputing", "data parallel 2"],
)
def test_compiled_losses_and_every_reduced_gradient_equal_those_without(two_ranks, network, tensor, layout):
    compiled, plain = (
        two_ranks.run(jobs.losses_and_gradients, tensor, steps=5, network=network, compiled=how, **layout)
        for how in (True, False)
    )
    for theirs, ours in zip(compiled, plain, strict=True):
        same(theirs, ours)


def test_packing_and_the_masked_only_head_change_nothing(one_rank, reference, network):
    (plain,) = one_rank.run(jobs.losses_and_gradients, 1, network=network, plain=True)
    same(plain, reference)


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.exhaustive)], ids=["", "compiled"])
@pytest.mark.parametrize("sequence", [False, True], ids=["tensor parallel 2", "tensor and sequence parallel 2"])
def test_recomputing_gives_the_same_losses_and_gradients_bit_for_bit(two_ranks, network, sequence, compiled):
    dropped = {**network, "hidden_dropout": 0.1, "attention_dropout": 0.1}
    run = lambda how: two_ranks.run(  # noqa: E731
        jobs.losses_and_gradients, 2, steps=3, network=dropped, recompute=how, sequence=sequence, compiled=compiled
    )
    kept = run("none")
    for how in ("selective", "full"):
        for theirs, ours in zip(run(how), kept, strict=True):
            same(theirs, ours, losses=0, gradients=0)


@pytest.mark.parametrize("sequence", [False, True])
def test_sequence_parallel_ranks_share_out_the_tokens(two_ranks, sequence):
    for tokens, mine in two_ranks.run(jobs.tokens_in_a_layer, sequence):
        assert mine == tokens // 2 if sequence else mine == tokens


@pytest.mark.parametrize(
    ("tensor", "layout"),
    [
        (2, {}),
        (2, {"sequence": True, "recompute": "full"}),
        (1, {}),
        (1, {"precision": "fp16"}),
        pytest.param(2, {"sequence": True, "compiled": True}, marks=pytest.mark.exhaustive),
    ],
    ids=[
        "tensor parallel 2",
        "tensor and sequence parallel 2, recomputing",
        "data parallel 2",
        "data parallel 2, fp16",
        "tensor and sequence parallel 2, compiled",
    ],
)
def test_a_run_with_dropout_goes_on_from_a_checkpoint_bit_for_bit(two_ranks, tmp_path, tensor, layout):
    options = {"optim": {"initial_loss_scale": 2**16, "loss_scale_window": 4}}  # in fp16 it goes down and up again
    whole = two_ranks.run(jobs.train, tensor, 12, folder=str(tmp_path), save_at=6, options=options, **layout)
    saved, passed_over = checkpoint.newest(tmp_path)
    assert saved is not None
    assert not passed_over
    resumed = two_ranks.run(jobs.train, tensor, 12, load=str(saved), options=options, **layout)
    for results, later in zip(whole, resumed, strict=True):
        assert later == results[6:]


def test_dropout_differs_between_data_parallel_ranks_but_not_between_runs(two_ranks):
    first = two_ranks.run(jobs.train, 1, 3)
    again = two_ranks.run(jobs.train, 1, 3)
    assert first == again
    assert first[0] != first[1]
