# SPDX-License-Identifier: Apache-2.0
"""A run and its data: it goes on with its own cells in a store that grew, and leaves no thread."""

import shutil

import anndata as ad
import pytest
from runs import TINY, Command, differing, figures, fine, here, tensors

import jobs


@pytest.fixture(scope="module")
def grown(store, data, made):
    """A copy of the store to which cells were appended."""
    path = made / "grown"
    shutil.copytree(store, path)
    ad.read_h5ad(data / "cells" / "pbmc4k_a.h5ad")[:300].copy().write_h5ad(made / "more.h5ad")
    code, _, errors = here("convert", made / "more.h5ad", "--out", path, "--append")
    assert code == 0, errors
    return path


def test_a_run_goes_on_bit_for_bit_on_its_own_cells_of_a_store_that_has_grown(copies, grown, tmp_path):
    run, before = tmp_path / "run", copies[0]
    shutil.copytree(before, run)
    shutil.rmtree(run / "checkpoints" / "step-00000012")
    printed = fine("pretrain", f"out={run}", "resume=true", f"store={grown}")
    assert "grown to 2,670 cells, generation 2; the run goes on with its own 2,370 of generation 1" in printed
    assert "resuming at step 10 " in printed
    assert figures(run) == figures(before)
    assert not differing(*(tensors(r / "checkpoints" / "step-00000012") for r in (run, before)))


THREADS = """
import os, signal, sys, threading
from megacell.store.sampling.batch_stream import BatchStream
from megacell.store.sampling.prefetched import NAME
from megacell.training.run.run import Run
from megacell.core.cli.main import main

after_step, make = Run.after_step, BatchStream.step

def running():
    return sum(thread.name.startswith(NAME) for thread in threading.enumerate())

def attempt(out, *signals, steps="steps=100000"):
    def then(run, *words):
        after_step(run, *words)
        during.append(running())
        for number in signals if run.step == 3 else ():
            os.kill(os.getpid(), number)
    Run.after_step, during = then, []
    try:
        code = main(["pretrain", *sys.argv[2:], f"out={sys.argv[1]}/{out}", steps])
    except SystemExit as end:
        code = end.code
    print("found", out, code, during[0], running())

def broken(stream, k):
    if k == 20:
        raise RuntimeError("broken")
    return make(stream, k)

attempt("done", steps="steps=4")
attempt("stopped", signal.SIGTERM)
attempt("interrupted", signal.SIGINT, signal.SIGINT)
BatchStream.step = broken
attempt("failed")
"""


def test_no_thread_outlives_a_run_however_that_ends(store, vocabulary, tmp_path):
    words = [tmp_path, f"store={store}", f"vocabulary={vocabulary}", *TINY, "validation.every=100000", "data.threads=2"]
    command = Command(*words, script=("-c", THREADS))
    code, out, errors = command.end()
    assert code == 0, errors
    found = [line.split()[1:] for line in out.splitlines() if line.startswith("found ")]
    assert found == [["done", "0", "2", "0"], ["stopped", "75", "2", "0"], ["interrupted", "1", "2", "0"],
                     ["failed", "70", "2", "0"]]  # fmt: skip


def test_ranks_that_opened_different_generations_do_not_start(two_ranks):
    assert two_ranks.run(jobs.agree, "00000000000000a0", "00000000000000a0") == ["agreed", "agreed"]
    refusals = two_ranks.run(jobs.agree, "00000000000000a0", "f0000000000000a0")
    assert all("grew while the run was starting" in line for line in refusals)
