# SPDX-License-Identifier: Apache-2.0
"""What the tests of several packages share: helper modules, real data, a cache of their own, a store in memory."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "tests"))  # helper modules, also in the processes that tests start

settings.register_profile("megacell", deadline=None)  # a first example may have to wait for the compiler
settings.load_profile("megacell")


@pytest.fixture(scope="session")
def data() -> Path:
    """The folder of real cells and published dictionaries."""
    folder = Path(os.environ.get("MEGACELL_TEST_DATA") or ROOT.parent / "shared" / "data")
    if not folder.is_dir():
        pytest.skip(f"no test data at {folder}: set MEGACELL_TEST_DATA to the folder that holds cells/ and geneformer/")
    return folder


@pytest.fixture(scope="session", autouse=True)
def session_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The cache of what fixtures of the session do: never the user's."""
    path = tmp_path_factory.mktemp("session_cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MEGACELL_CACHE", str(path))
        yield path


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache for each test."""
    path = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("MEGACELL_CACHE", str(path))
    return path


@pytest.fixture(scope="session")
def made_up() -> type:
    """The class of stores in memory."""
    from store_in_memory import StoreInMemory

    return StoreInMemory
