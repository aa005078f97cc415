# SPDX-License-Identifier: Apache-2.0
"""A run folder's README.md: what it says is so, and what it tells to type works."""

import re
import shlex
import sys

import pytest
import yaml
from omegaconf import OmegaConf
from runs import Command, fine

from megacell.core.cli.main import build_parser
from megacell.training.family import About
from megacell.training.run import run_readme


def commands(run) -> list[list[str]]:
    """Return the commands that a run's README tells to type."""
    text = (run / run_readme.NAME).read_text()
    return [shlex.split(line) for line in re.findall(r"\| `(\w+ .+?)`", text)]


def test_a_run_says_how_it_was_made(copies, store):
    from megacell.store import CellStore

    run, _ = copies
    text = (run / run_readme.NAME).read_text()
    (options,) = re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)
    assert yaml.safe_load(options)["steps"] == yaml.safe_load((run / "config.yaml").read_text())["steps"]
    assert CellStore.open(store).digest in text
    (typed,) = re.findall(r"^      (megacell pretrain .*)$", text, re.MULTILINE)
    words = shlex.split(typed)
    assert {f"store={store}", f"out={run}", "devices=2"} <= set(words)
    assert "2 processes (CPU)" in text


def test_every_command_that_a_run_names_is_one(copies):
    from megacell.training.config.settings import compose

    run, _ = copies
    named = [words for words in commands(run) if words[0] == "megacell"]
    assert {words[1] for words in named} == {"pretrain", "evaluate", "export", "embed", "report"}
    for words in named:
        args = build_parser().parse_args(words[1:])
        if words[1] == "pretrain":
            compose(args.settings)
    (look,) = (words for words in commands(run) if words[0] == "tensorboard")
    assert look[-1] == f"{run}/logs"


def test_every_file_that_a_run_names_is_there(copies):
    run, _ = copies
    names = set(re.findall(r"^\| `([\w./]+)` \|", (run / run_readme.NAME).read_text(), re.MULTILINE))
    assert len(names) == 7
    assert not [name for name in names if not (run / name).exists()]


def test_a_run_that_goes_on_says_so(tmp_path, monkeypatch):
    about = About(made_from="Made up.")
    options = {"out": "r", "resume": False, "devices": 1, "log_every": 1, "checkpoint": {"keep": 2}}
    monkeypatch.setattr(sys, "argv", ["cli.py", "pretrain", "out=a run"])
    run_readme.write_readme(tmp_path, OmegaConf.create(options), about)
    before = (tmp_path / run_readme.NAME).read_text()
    monkeypatch.setattr(sys, "argv", ["cli.py", "pretrain", "out=a run", "resume=true", "steps=9"])
    run_readme.write_readme(tmp_path, OmegaConf.create({**options, "resume": True}), about)
    after = (tmp_path / run_readme.NAME).read_text()
    assert after.startswith(before)
    assert "      megacell pretrain 'out=a run'\n" in before
    assert "      megacell pretrain 'out=a run' resume=true steps=9\n" in after


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        (["cli.py", "pretrain", "out=a b", "--debug"], "megacell pretrain 'out=a b'"),
        (["notebook.py"], "(from Python, with the options above)"),
    ],
)
def test_what_was_typed_is_told(argv, told):
    assert run_readme.command(argv) == told


@pytest.mark.exhaustive
def test_what_a_run_tells_to_type_works(store, vocabulary, data, tmp_path):
    from runs import TINY

    run = tmp_path / "run"
    fine("pretrain", f"store={store}", f"vocabulary={vocabulary}", f"out={run}", *TINY, "steps=2")
    assert f"      megacell pretrain store={store} " in (run / run_readme.NAME).read_text()
    given = {
        "CELLS.h5ad": data / "cells/pbmc4k_a.h5ad",
        "EMBEDDED.h5ad": tmp_path / "e.h5ad",
        "store=STORE": f"store={store}",
    }
    for words in commands(run):
        if words[0] == "megacell":
            more = [*TINY, "steps=1"] if any(word.startswith("init=") for word in words) else []
            words = [str(given.get(word, word)).replace("out=NEW", f"out={tmp_path}/new") for word in words[1:]]
            code, out, err = Command(*words, *more).end()
            assert code == 0, f"{words}\n{out}\n{err}"
