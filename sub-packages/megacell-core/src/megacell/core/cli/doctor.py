# SPDX-License-Identifier: Apache-2.0
"""The sub-command doctor: checks of the machine, and those that other packages bring.

A package brings a `Check` by an entry point of the group `versions.CHECKS`; it is imported when doctor runs.
"""

import argparse
import json
from collections.abc import Callable
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from megacell.core.findings import Finding
from megacell.core.versions import CHECKS

Check = Callable[[bool], list[Finding]]  # takes whether to be quick, which forbids slow imports
_EPILOG = """\
examples:
  megacell doctor
  megacell doctor --path /scratch            the disk that is to hold stores and runs
  megacell doctor --quick                    without torch: for the health check of a container
  megacell doctor --json

exit codes: 0 all will work, 1 something will not
"""
_SHOWN = ("numpy", "scipy", "numba", "h5py", "anndata", "pyarrow", "zarr")  # versions that a bug report needs


def register_doctor(commands: Any) -> None:
    """Add `doctor` to argparse's sub-parsers."""
    doctor = commands.add_parser(
        "doctor",
        help="check whether this machine has what Megacell needs",
        description="Check versions, GPUs, memory, disk and limits; print what a run would use, and what to fix.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    doctor.add_argument("--path", type=Path, default=Path(), help="a folder whose disk is checked (default: this one)")
    doctor.add_argument("--quick", action="store_true", help="import nothing slow, and measure no disk")
    doctor.add_argument("--json", action="store_true", help="print it as JSON")
    doctor.set_defaults(run=run_doctor)


def run_doctor(args: argparse.Namespace) -> int:
    """Check everything and print the findings; exit code 1 if something will not work."""
    from megacell.core.findings import show, to_json, will_work

    findings = check(args.path, args.quick)
    for point in sorted(entry_points(group=CHECKS), key=lambda point: point.name):
        check_of_package: Check = point.load()
        findings += check_of_package(args.quick)
    findings = list(dict.fromkeys(findings))  # a package may be wrong for more than one of ours
    if args.json:
        print(json.dumps(to_json(findings), indent=1))
    else:
        show(findings)
    return 0 if will_work(findings) else 1


def check(path: Path, quick: bool) -> list[Finding]:
    """Return what is found without other packages: versions, the machine, and the disk under a folder."""
    from megacell.core import machine
    from megacell.core.versions import own_distributions, package_versions, python_version

    ours = own_distributions()
    findings = [python_version(), *package_versions(ours, (*ours, *_SHOWN))]
    findings += [machine.cores(), machine.memory(), machine.shared_memory(), machine.open_files()]
    return findings + machine.disk(path, measure=not quick)
