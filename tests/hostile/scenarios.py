# SPDX-License-Identifier: Apache-2.0
"""The commands that write, each as it is tried: its words, what lies there before, and how its output is looked at.

A new command that writes gets an entry here (`test_harness.py` asks for it). Words in braces are files of the ground,
which `ground.py` makes; all other paths are below the folder of a try.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import states
from forks import fork_ranks, fork_workers

Words = Sequence[str]
TRAIN = (
    "pretrain", "store={store}", "vocabulary={vocabulary}", "out=run", "model.hidden=32", "model.ffn=64",
    "model.heads=4", "model.layers=2", "model.max_length=64", "model.hidden_dropout=0.1", "model.attention_dropout=0.1",
    "batch.cells=8", "validation.cells=8", "data.baseline_cells=16", "log_every=1", "logger=csv", "validation.every=4",
    "checkpoint.every=2", "checkpoint.keep=3",
)  # fmt: skip
BEGUN, STEPS = 4, 8  # steps of the run that is resumed, and of all runs in the end
GO_ON = ("pretrain", "out=run", "resume=true")
CELLS_AT_ONCE = 16  # of commands that work in blocks, so that a few cells are several


@dataclass(frozen=True)
class Scenario:
    """A command as it is tried.

    Attributes
    ----------
    name : str
        The sub-command's words first, so that it is seen which commands are here; then what is special.
    words : sequence of str
        The command line; or ``work``, a function of the folder, in its place.
    shown : callable
        Of the folder: the state that a user meets, as a text: the old one or the new one after any kill.
    content : callable
        Of the folder: by name, what the command has to end with, whatever happened before.
    before : sequence of command lines
        What has been run in the folder before.
    again : callable, optional
        Of the folder: the command line that goes on after a kill; the same one by default.
    repeatable : bool
        It may be run again after it has succeeded.
    settle : callable
        Called in the command's process before it starts.
    training : bool
        It needs NeMo and Megatron imported.
    """

    name: str
    words: Words
    shown: Callable[[Path], str]
    content: Callable[[Path], dict[str, str]]
    before: Sequence[Words] = ()
    again: Callable[[Path], Words] | None = None
    repeatable: bool = False
    settle: Callable[[], None] = field(default=lambda: None)
    training: bool = False
    work: Callable[[Path], int] | None = None


def _tree(name: str) -> dict[str, Callable]:
    """Return how an output is looked at that is there as a whole or not at all, byte by byte."""
    return _looked_at(name, states.tree, states.files_of)


def _store(name: str) -> dict[str, Callable]:
    return _looked_at(name, states.store, states.files_of)


def _looked_at(name: str, shown: Callable[[Path], str], content: Callable[[Path], dict[str, str]]) -> dict:
    return {"shown": lambda folder: shown(folder / name), "content": lambda folder: content(folder / name)}


def _read(name: str, read: Callable[[Path], dict[str, str]]) -> dict[str, Callable]:
    """Return how an output is looked at whose bytes differ from time to time, through a reader."""

    def shown(path: Path) -> str:
        return str(sorted(read(path).items())) if path.exists() else states.ABSENT

    return _looked_at(name, shown, read)


def _small_blocks() -> None:
    """Let tokenize and embed work in small blocks, so that kills and faults fall between them."""
    from megacell.geneformer.embedding import inputs
    from megacell.geneformer.tokens import tokenize

    inputs.ROWS_AT_ONCE = tokenize.CELLS_AT_ONCE = CELLS_AT_ONCE
    tokenize.tokenize.__kwdefaults__["cells_a_file"] = 2 * CELLS_AT_ONCE


def _two_ranks() -> None:
    from megacell.core.cli.main import main

    fork_ranks(2, main)


def _go_on(folder: Path) -> Words:
    """Return what a user types after a run was killed: the same, until there is a run to go on with."""
    return GO_ON if (folder / "run" / "config.yaml").exists() else (*TRAIN, f"steps={STEPS}")


def _run(at_least: int = 0) -> dict[str, Callable]:
    return {
        "shown": lambda folder: states.saved(folder / "run", at_least=at_least),
        "content": lambda folder: states.run(folder / "run"),
        "repeatable": True,
        "training": True,
    }


_CONVERT = ("convert", "{cells}", "--out", "s", "--workers", "1")
CONVERT_A = ("convert", "{cells}/a.h5ad", "--out", "s", "--workers", "1")
APPEND_B = ("convert", "{cells}/b.h5ad", "--out", "s", "--append", "--workers", "1")
APPEND_C = ("convert", "{cells}/c.h5ad", "--out", "s", "--append", "--workers", "1")
COMPACT = ("compact", "s", "--workers", "1")
PRUNE = (*COMPACT, "--prune", "--older-than", "0")
_PRETRAIN = (*TRAIN, f"steps={STEPS}")

SCENARIOS = [
    Scenario("convert", _CONVERT, **_store("s")),
    Scenario("convert by two", (*_CONVERT[:-1], "2"), **_store("s"), settle=fork_workers),
    Scenario("convert append", APPEND_B, **_store("s"), before=[CONVERT_A]),
    Scenario("compact", COMPACT, **_store("s"), before=[CONVERT_A, APPEND_B, APPEND_C], repeatable=True),
    Scenario("compact prune", PRUNE, **_store("s"),
             before=[CONVERT_A, APPEND_B, APPEND_C, COMPACT], repeatable=True),
    Scenario("scdl export", ("scdl", "export", "{store}", "--out", "archive"), **_tree("archive")),
    Scenario("scdl import", ("scdl", "import", "{archive}", "--out", "s"), **_store("s")),
    Scenario("info html", ("info", "{store}", "--html", "page.html"), **_read("page.html", states.page),
             repeatable=True),
    Scenario("vocabulary build", ("vocabulary", "build", "{store}", "--out", "v", "--split-by", "cell", "--mergeable"),
             **_tree("v")),
    Scenario("vocabulary merge", ("vocabulary", "merge", "{vocabulary_a}", "{vocabulary_b}", "--out", "v"),
             **_tree("v")),
    Scenario("vocabulary import", ("vocabulary", "import", "--tokens", "{tokens}", "--medians", "{medians}",
                                   "--out", "v"), **_tree("v")),
    Scenario("tokenize", ("tokenize", "{store}", "--vocabulary", "{vocabulary}", "--out", "t"), **_tree("t"),
             settle=_small_blocks),
    Scenario("embed h5ad", ("embed", "{model}", "{cells}/a.h5ad", "--out", "e.h5ad"),
             **_read("e.h5ad", states.embedded), settle=_small_blocks, training=True),
    Scenario("embed npy", ("embed", "{model}", "{cells}/a.h5ad", "--out", "e.npy"), **_tree("e.npy"),
             settle=_small_blocks, training=True),
    Scenario("export nemo", ("export", "{run}", "--to", "nemo", "--out", "m.nemo"), **_read("m.nemo", states.archive),
             training=True),
    Scenario("export hf", ("export", "{run}", "--to", "hf", "--out", "hf"), **_tree("hf"), training=True),
    Scenario("import", ("import", "{hf}", "--out", "m.nemo"), **_read("m.nemo", states.archive), training=True),
    Scenario("report", ("report", "{run}", "--out", "page.html"), **_read("page.html", states.page),
             repeatable=True, training=True),
    Scenario("pretrain", _PRETRAIN, **_run(), again=_go_on),
    Scenario("pretrain on two", (*_PRETRAIN, "devices=2"), **_run(), settle=_two_ranks,
             again=lambda folder: (*_go_on(folder), "devices=2")),
    Scenario("pretrain resume", (*GO_ON, f"steps={STEPS}"), **_run(BEGUN), before=[(*TRAIN, f"steps={BEGUN}")]),
]  # fmt: skip


def _overwrite(folder: Path) -> int:
    """Write a file in place, bit by bit, as no command of ours may."""
    with open(folder / "careless", "w") as file:
        for number in range(50):
            file.write(f"{number}\n")
            file.flush()
    return 0


CARELESS = Scenario("careless", (), **_tree("careless"), work=_overwrite)  # found lost, or the harness sees nothing
BY_NAME = {scenario.name: scenario for scenario in [*SCENARIOS, CARELESS]}
