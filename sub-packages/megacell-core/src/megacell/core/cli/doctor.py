# SPDX-License-Identifier: Apache-2.0
"""The sub-command doctor, which every package adds its own looks to."""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megacell.core.findings import Finding

Look = Callable[[bool], list[Finding]]  # takes whether it has to be quick, which forbids slow imports
_EPILOG = """\
examples:
  megacell doctor
  megacell doctor --path /scratch            the disk that is to hold stores and runs
  megacell doctor --quick                    without torch: for the health check of a container
  megacell doctor --json

exit codes: 0 all will work, 1 something will not
"""
_SHOWN = ("megacell", "megacell-store", "numpy", "scipy", "numba", "h5py", "anndata", "pyarrow", "zarr")


def doctor_looks(commands: Any) -> list[Look]:
    """Return the list that a package appends its looks to."""
    looks: list[Look] = commands.choices["doctor"].get_default("looks")
    return looks


def register_doctor(commands: Any) -> None:
    """Add `doctor` to argparse's sub-parsers."""
    doctor = commands.add_parser(
        "doctor",
        help="look whether this machine has what Megacell needs",
        description="Look at versions, GPUs, memory, disk and limits; say what will be used, and what to mend.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    doctor.add_argument(
        "--path", type=Path, default=Path(), help="a folder whose disk is looked at (default: this one)"
    )
    doctor.add_argument("--quick", action="store_true", help="import nothing slow, and measure no disk")
    doctor.add_argument("--json", action="store_true", help="print it as JSON")
    doctor.set_defaults(run=run_doctor, looks=[])


def run_doctor(args: argparse.Namespace) -> int:
    """Look at everything and tell it."""
    from megacell.core import machine
    from megacell.core.findings import package_versions, show, to_json, will_work

    findings = [machine.python_version(), *package_versions(["megacell-store"], _SHOWN, [])]
    findings += [machine.cores(), machine.memory(), machine.shared_memory(), machine.open_files()]
    findings += machine.disk(args.path, measure=not args.quick)
    findings += [finding for look in args.looks for finding in look(args.quick)]
    if args.json:
        print(json.dumps(to_json(findings), indent=1))
    else:
        show(findings)
    return 0 if will_work(findings) else 1
