# SPDX-License-Identifier: Apache-2.0
"""Each way in which a sub-command ends has its exit code and its one line."""

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest

from megacell.core.cli import main as cli
from megacell.core.errors import DataError, KilledError, UsageError
from megacell.core.versions import COMMANDS


@pytest.fixture
def run(monkeypatch, capsys):
    """A function that runs a sub-command `work`, which ends in an error or with a code; returns code and errors."""

    def call(end: BaseException | int, *words: str) -> tuple[int, str]:
        def work(args) -> int:
            if isinstance(end, BaseException):
                raise end
            return end

        def register(commands) -> None:
            commands.add_parser("work").set_defaults(run=work)

        point = SimpleNamespace(name="made-up", load=lambda: register)
        monkeypatch.setattr(cli, "entry_points", lambda group: [point] if group == COMMANDS else [])
        return cli.main([*words, "work"]), capsys.readouterr().err

    return call


@pytest.mark.parametrize(
    ("end", "code", "line"),
    [
        (0, 0, ""),
        (75, 75, ""),
        (DataError("a.h5ad: bad"), 1, "megacell work: error: a.h5ad: bad\n"),
        (KilledError("killed"), 1, "megacell work: error: killed\n"),
        (UsageError("--n: bad"), 2, "megacell work: error: --n: bad\n"),
        (OSError(28, "No space left", "out"), 1, "megacell work: error: [Errno 28] No space left: 'out'\n"),
        (ValueError("odd\nmore"), 70, "megacell work: internal error: ValueError: odd; --debug shows where\n"),
        (KeyboardInterrupt(), 130, "megacell: interrupted\n"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else None,
)
def test_an_end_has_its_code_and_line(end, code, line, run):
    assert run(end) == (code, line)


def test_debug_shows_where_an_error_was_raised(run):
    code, text = run(DataError("bad"), "--debug")
    assert code == 1
    assert text.startswith("Traceback")
    assert text.endswith("megacell work: error: bad\n")
    with pytest.raises(ValueError, match="odd"):
        run(ValueError("odd"), "--debug")


def test_a_reader_that_has_seen_enough_is_no_error():
    reading, writing = os.pipe()
    os.close(reading)
    words = [sys.executable, "-m", "megacell", "completion", "bash"]
    done = subprocess.run(words, stdout=writing, stderr=subprocess.PIPE, text=True)
    os.close(writing)
    assert (done.returncode, done.stderr) == (0, "")


def test_the_module_is_the_command():
    done = subprocess.run([sys.executable, "-m", "megacell", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout == f"megacell {cli.installed_version()}\n"


def test_an_error_is_shown_in_one_line_without_commands_to_the_terminal(run):
    code, line = run(DataError("a\x1b]0;title\x07\nb\u202e\x9b31m\udcff ü 細胞.h5ad: bad"))
    assert code == 1
    assert line == r"megacell work: error: a\x1b]0;title\x07\nb\u202e\x9b31m\udcff ü 細胞.h5ad: bad" + "\n"
