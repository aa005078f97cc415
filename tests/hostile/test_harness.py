# SPDX-License-Identifier: Apache-2.0
"""The harness of `make test-hostile`: a few tries of each kind, and that it sees what is lost or let through."""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.exhaustive  # minutes on two cores; `make test-hostile` runs the harness itself
HERE = Path(__file__).resolve().parent
preloads = pytest.mark.skipif(not shutil.which("gcc") or sys.platform != "linux", reason="needs Linux and gcc")
WITHOUT_OUTPUT = {"bench batches", "bench embed", "bench read", "bench train", "completion", "doctor", "evaluate",
                  "overlap", "verify"}  # fmt: skip
NOT_TRIED = {
    "demo": "runs other commands, each of them tried",
    "vocabulary fetch": "test_servers.py; it is saved as by `vocabulary import`",
}


@pytest.fixture(scope="module")
def environment(data) -> dict[str, str]:
    """Of the harness' processes, which find this tree's packages and the real cells."""
    paths = os.pathsep.join([str(HERE), *(path for path in sys.path if path)])
    return {**os.environ, "PYTHONPATH": paths, "MEGACELL_TEST_DATA": str(data)}


def harness(environment: dict[str, str], script: str, *words: object) -> tuple[int, str]:
    """Run one of the harness' scripts; return its exit code and all that it printed."""
    command = [sys.executable, HERE / script, *map(str, words)]
    ended = subprocess.run(command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    return ended.returncode, ended.stdout


def rows(printed: str) -> dict[tuple[str, str], list[int]]:
    """Return the numbers of each row of the table, by kind and command."""
    found = re.findall(r"^(\w+) +(\w[\w ]*?)  +([\d, ]+)$", printed, re.M)
    return {(kind, command): [int(n.replace(",", "")) for n in numbers.split()] for kind, command, numbers in found}


@preloads
def test_a_few_kills_and_faults_lose_nothing(environment):
    code, printed = harness(environment, "watch.py", "--quick")
    assert code == 0, printed
    tried, hit, lost, *_ = rows(printed)["kills", "all"]
    assert tried >= hit >= 8
    assert lost == 0
    tried, hit, lost, *_ = rows(printed)["faults", "all"]
    assert tried == hit == 16
    assert lost == 0
    assert printed.splitlines()[-1].startswith("0 lost or let through")


@preloads
@pytest.mark.parametrize("kind", ["kills", "faults"])
def test_a_command_that_writes_in_place_is_found_lost(kind, environment):
    other = {"kills": "faults", "faults": "kills"}[kind]
    code, printed = harness(environment, "watch.py", "--only", "careless", f"--{kind}", 4, f"--{other}", 0)
    assert code == 1
    assert rows(printed)[kind, "careless"][2] >= 2, printed
    assert "careless" in printed


CASES = """
import pytest
@pytest.mark.parametrize("size", range(5))
def test_five(size):
    assert size != 3
def test_many(record_property):
    record_property("hostile_inputs", 40)
def test_no_input():
    pass
@pytest.mark.parametrize("size", range(2))
def test_not_here(size):
    pytest.skip("elsewhere")
"""


def test_parametrised_cases_are_counted_and_those_that_fail_were_let_through(environment, tmp_path):
    (tmp_path / "test_made.py").write_text(CASES)
    code, printed = harness(environment, "inputs.py", tmp_path / "answer.json", 1, tmp_path / "test_made.py")
    assert code == 0, printed
    (tally,) = json.loads((tmp_path / "answer.json").read_text())
    assert tally["tried"] == 5 + 40
    assert [line.split(": ")[1] for line in tally["lost"]] == ["test_five[3]"]


def leaves(parser: argparse.ArgumentParser, words: str = "") -> dict[str, argparse.ArgumentParser]:
    """Return all sub-commands by their words."""
    groups = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    if not groups:
        return {words: parser}
    found = {}
    for name, own in groups[0].choices.items():
        found |= leaves(own, f"{words} {name}".strip())
    return found


def test_every_command_that_writes_is_tried():
    sys.path.append(str(HERE))
    from scenarios import SCENARIOS

    from megacell.core.cli.main import build_parser

    tried = {scenario.name for scenario in SCENARIOS}
    for command in leaves(build_parser()):
        seen = any(name == command or name.startswith(f"{command} ") for name in tried)
        assert seen or command in WITHOUT_OUTPUT or command in NOT_TRIED, f"{command}: add it to scenarios.py"
