# SPDX-License-Identifier: Apache-2.0
"""The toy family, where the tests and the processes that they start find it."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "toy"))  # also searched for entry points; runs.Command hands it on
