# SPDX-License-Identifier: Apache-2.0
"""What the command line stands on imports nothing slow."""

import subprocess
import sys

MODULES = ("__main__", "core.errors", "core.files", "core.findings", "core.versions", "core.machine", "core.progress",
           "core.cli.main", "core.cli.completion", "core.cli.doctor", "core.cli.parsers")  # fmt: skip
SLOW = ("numpy", "numba", "pandas", "rich", "packaging", "shtab", "torch")


def test_no_numpy_is_imported_before_it_is_needed():
    imports = "; ".join(f"import megacell.{name}" for name in MODULES)
    code = f"import sys; {imports}; print(sorted(set({SLOW}) & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
