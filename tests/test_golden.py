# SPDX-License-Identifier: Apache-2.0
"""The losses of `model=tiny` over 50 steps, as they were when they were written down.

Two threads instead of one change them by 6e-7 relatively, a LayerNorm epsilon of 1e-7 instead of 1e-12 by 5e-4 and
more. What changes them on purpose has to write down new ones, and say why.
"""

import json
from pathlib import Path

import numpy as np
import pytest

import jobs

GOLDEN = json.loads((Path(__file__).parent / "golden_tiny.json").read_text())
NETWORKS = {
    "pre-LN, GELU": {},
    "post-LN, ReLU": {"norm": "post", "activation": "relu", "scaled_init": False},
}


@pytest.mark.parametrize("name", GOLDEN)
def test_tiny_loses_what_it_lost_before(one_rank, name):
    (losses,) = one_rank.run(jobs.losses_of_tiny, len(GOLDEN[name]), **NETWORKS[name])
    np.testing.assert_allclose(losses, GOLDEN[name], rtol=1e-4)
    assert np.mean(losses[-5:]) < losses[0] - 0.2
