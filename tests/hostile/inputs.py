# SPDX-License-Identifier: Apache-2.0
"""Counts hostile inputs: each parametrised case of a test file is one that was tried; one that fails was let through.

A test that tries many inputs by itself says so by pytest's `record_property`: "hostile_inputs", their number.

Usage: inputs.py JSON TEST_FILE …, in the root of the repository; writes the tallies there, a file each.
"""

import dataclasses
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from bench import Tally

PROPERTY = "hostile_inputs"
FUZZ = Path("sub-packages/megacell-store/tests/fuzz_sources.py")


class Counter:
    """A plugin of pytest that tallies the cases of each file."""

    def __init__(self) -> None:
        self.tallies: dict[str, Tally] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Count a case when it has been run, or when what it needs could not be made."""
        path, _, name = report.nodeid.partition("::")
        tally = self.tallies.setdefault(path, Tally("inputs", Path(path).stem.removeprefix("test_")))
        tally.seconds += report.duration
        if report.when == "call" and not report.skipped:
            number = dict(report.user_properties).get(PROPERTY, int(name.endswith("]")))
            tally.tried += number
            tally.hit += number
        if report.failed:
            tally.lost.append(f"{path}: {name}: {_reason(report)}")


def _reason(report: pytest.TestReport) -> str:
    crash = getattr(report.longrepr, "reprcrash", None)
    return str(crash.message if crash else report.longrepr).strip()[:400]


def count(files: list[Path], folder: Path, at_once: int) -> list[Tally]:
    """Run test files in a pytest of their own; returns a tally for each."""
    answer = folder / "inputs.json"
    command = [sys.executable, __file__, answer, str(at_once), *files]
    ended = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""})
    if not answer.exists():
        return [Tally("inputs", "pytest", lost=[f"pytest ended with {ended.returncode}: {ended.stdout[-2000:]}"])]
    return [Tally(**each) for each in json.loads(answer.read_text())]


def fuzz(root: Path, folder: Path, every: int) -> Tally:
    """Convert every so many-th damaged file of each input format, as `fuzz_sources.py` makes and judges them."""
    begun, tally = time.monotonic(), Tally("inputs", "damaged files of all formats")
    ended = subprocess.run([sys.executable, root / FUZZ, folder, str(every)], capture_output=True, text=True)
    for form in map(json.loads, ended.stdout.splitlines()):
        wrong = form.pop("wrong")
        tally.tried += sum(number for number in form.values() if isinstance(number, int))
        tally.lost += wrong
    if ended.returncode:
        tally.lost.append(f"{FUZZ}: {ended.stderr.strip()[-600:]}")
    tally.hit, tally.seconds = tally.tried, time.monotonic() - begun
    return tally


def main() -> None:
    """Run the files given, and write what was counted."""
    answer, at_once, files = Path(sys.argv[1]), sys.argv[2], sys.argv[3:]
    counter = Counter()
    options = ["-n", at_once, "--dist", "loadfile"] if at_once != "1" else []
    code = pytest.main([*files, "-q", "-p", "no:cacheprovider", *options], plugins=[counter])
    tallies = list(counter.tallies.values())
    if code not in (0, 1):  # files that cannot be imported, say
        tallies.append(Tally("inputs", "pytest", lost=[f"pytest ended with {int(code)}"]))
    answer.write_text(json.dumps([dataclasses.asdict(tally) for tally in tallies]))


if __name__ == "__main__":
    main()
