# SPDX-License-Identifier: Apache-2.0
"""Fixtures of the tests that cross sub-packages."""

import fcntl
import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "sub-packages/megacell-geneformer/tests"))  # hugging.py
sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))  # whose scripts find each other so

from runs import STEPS, TINY, fine

from ranks import Ranks


@pytest.fixture(scope="module")
def two_ranks():
    """Two gloo ranks, for a file's tests: they are never quite idle."""
    pool = Ranks(2)
    yield pool
    pool.close()


@pytest.fixture(scope="module")
def one_rank():
    """One rank of its own: the reference."""
    pool = Ranks(1)
    yield pool
    pool.close()


@pytest.fixture(scope="session")
def gpus() -> int:
    """How many GPUs there are; tests that need one are skipped where there is none."""
    import torch

    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return torch.cuda.device_count()


@pytest.fixture(scope="session", autouse=True)
def cache(session_cache) -> Path:
    """The session's cache in place of one for each test: commands of several tests read the same store."""
    return session_cache


@pytest.fixture(scope="session")
def made(tmp_path_factory) -> Path:
    """The folder of what the session's commands make."""
    return tmp_path_factory.mktemp("made")


@pytest.fixture(scope="session")
def shared(tmp_path_factory) -> Callable[..., tuple[Path, str]]:
    """What several test processes read, made by a command of the first that asks: path, and what was printed."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "shared"
    folder.mkdir(exist_ok=True)

    def make(name: str, *words: object, hydra: bool = False) -> tuple[Path, str]:
        path, printed = folder / name, folder / f"{name}.printed"
        with open(folder / f"{name}.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not printed.exists():
                printed.write_text(fine(*words, *([f"out={path}"] if hydra else ["--out", path])))
        return path, printed.read_text()

    return make


@pytest.fixture(scope="session")
def store(data, shared) -> Path:
    """All real cells."""
    return shared("store", "convert", data / "cells")[0]


@pytest.fixture(scope="session")
def vocabulary(store, shared) -> Path:
    """Of the real cells that are not held out, one in ten by cell: all cell types are on both sides."""
    return shared("vocabulary", "vocabulary", "build", store, "--split-by", "cell", "--mergeable")[0]


def _train(shared, name: str, store: Path, vocabulary: Path, *settings: str) -> tuple[Path, str]:
    given = (
        *TINY,
        f"steps={STEPS}",
        "validation.every=6",
        "checkpoint.every=5",
        "checkpoint.keep=9",
        "devices=2",
        *settings,
    )
    return shared(name, "pretrain", f"store={store}", f"vocabulary={vocabulary}", *given, hydra=True)


@pytest.fixture(scope="session")
def copies(store, vocabulary, shared) -> tuple[Path, str]:
    """A run of two data parallel ranks, and what it printed."""
    return _train(shared, "copies", store, vocabulary)


@pytest.fixture(scope="session")
def halves(store, vocabulary, shared) -> tuple[Path, str]:
    """A run of two tensor parallel ranks, and what it printed."""
    return _train(shared, "halves", store, vocabulary, "parallel.tensor=2")
