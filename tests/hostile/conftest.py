# SPDX-License-Identifier: Apache-2.0
"""The helper modules of this folder, for its tests."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
