# SPDX-License-Identifier: Apache-2.0
"""`deterministic=true`: on a CPU the same as ever; on a GPU, too, a run that goes on computes the same bits.

That runs on a CPU go on with it is in test_resume.py, whose runs ask for it.
"""

import os
import shutil

import pytest
import torch
from runs import TINY, differing, figures, fine, here, one_line, tensors

import jobs
from megacell.training.distributed import device

STEPS, EVERY = 12, 6
DROPOUT = ("model.hidden_dropout=0.1", "model.attention_dropout=0.1")
ON_A_GPU = {
    "fp32": ("precision=fp32", *DROPOUT),
    "bf16": ("precision=bf16", *DROPOUT),
    "fp16": ("precision=fp16", *DROPOUT),
    "bf16, efficient": ("precision=bf16", *DROPOUT, "attention=efficient"),
    "bf16, compiled": ("precision=bf16", *DROPOUT, "compile=true"),
    "bf16, recomputed": ("precision=bf16", *DROPOUT, "parallel.recompute=full"),
}


@pytest.mark.cuda
@pytest.mark.parametrize("choices", ON_A_GPU.values(), ids=ON_A_GPU.keys())
def test_a_run_on_a_gpu_that_goes_on_computes_the_same_bits(choices, gpus, store, vocabulary, tmp_path):
    every = (f"steps={STEPS}", f"checkpoint.every={EVERY}", "checkpoint.keep=9", f"validation.every={EVERY}")
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    given = (f"store={store}", f"vocabulary={vocabulary}", *TINY, *choices, *every, "deterministic=true")
    fine("pretrain", *given, f"out={whole}")
    shutil.copytree(whole, resumed)
    shutil.rmtree(resumed / "checkpoints" / f"step-{STEPS:08d}")
    assert f"resuming at step {EVERY} " in fine("pretrain", f"out={resumed}", "resume=true")
    assert figures(resumed) == figures(whole)
    last = f"checkpoints/step-{STEPS:08d}"
    assert not differing(tensors(resumed / last), tensors(whole / last))


def test_on_a_cpu_it_changes_nothing(one_rank):
    kept, asked = (one_rank.run(jobs.losses_and_gradients, 1, steps=5, deterministic=how)[0] for how in (False, True))
    assert asked[0] == kept[0]
    for one, other in zip(asked[1], kept[1], strict=True):
        assert not differing(one, other)


def test_inside_an_operation_that_is_not_deterministic_raises_and_outside_nothing_has_changed(monkeypatch):
    monkeypatch.setenv("NCCL_ALGO", "Tree")
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    before = dict(os.environ)
    put = lambda: torch.zeros(3).put_(torch.tensor([0, 0]), torch.ones(2))  # noqa: E731
    with device.deterministic():
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
        assert os.environ["NCCL_ALGO"] == "Ring"
        with pytest.raises(RuntimeError, match="does not have a deterministic implementation"):
            put()
    assert dict(os.environ) == before
    put()
    assert torch.utils.deterministic.fill_uninitialized_memory
    with device.deterministic(False):
        put()


def test_it_is_true_or_false(store, vocabulary, tmp_path):
    code, _, err = here(
        "pretrain", f"store={store}", f"vocabulary={vocabulary}", f"out={tmp_path / 'run'}", "deterministic=yes please"
    )
    assert code == 2
    one_line(err, "deterministic=yes please", "true or false")
