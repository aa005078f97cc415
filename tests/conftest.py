# SPDX-License-Identifier: Apache-2.0
"""Fixtures of the tests that cross sub-packages."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # jobs.py and ranks.py, also in the ranks' own processes

from ranks import Ranks


@pytest.fixture(scope="session")
def two_ranks():
    """Two gloo ranks, for the whole session."""
    pool = Ranks(2)
    yield pool
    pool.close()


@pytest.fixture(scope="session")
def one_rank():
    """One rank of its own: the reference."""
    pool = Ranks(1)
    yield pool
    pool.close()
