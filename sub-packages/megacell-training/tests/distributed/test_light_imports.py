# SPDX-License-Identifier: Apache-2.0
"""What no run uses is not imported at its start, and can be imported afterwards."""

import importlib.util

import pytest
from runs import fine

CODE = """
import sys
from megacell.training.distributed.device import quiet
from megacell.training.distributed.light_imports import UNUSED, without_unused
{before}
quiet()
print(sorted(name for name in sys.modules if name.split(".")[0] in UNUSED))
import torchmetrics, lightning.pytorch
print(torchmetrics.MeanMetric()(3.0).item(), lightning.pytorch.Trainer.__module__.split(".")[0])
with without_unused():
    assert sys.modules["torchmetrics"] is torchmetrics, "what was imported before stays"
"""


def test_it_is_not_imported_at_the_start_and_is_whole_afterwards():
    first, second = fine(script=("-c", CODE.format(before=""))).strip().splitlines()[-2:]
    assert first == "[]"
    assert second == "3.0 lightning"


@pytest.mark.skipif(importlib.util.find_spec("transformers") is None, reason="no transformers here")
def test_what_was_imported_before_is_the_same_module_after():
    before = "import transformers; kept = transformers"
    after = "\nassert sys.modules['transformers'] is kept\nprint('same')"
    assert fine(script=("-c", CODE.format(before=before) + after)).strip().splitlines()[-1] == "same"
