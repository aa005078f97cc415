# SPDX-License-Identifier: Apache-2.0
"""The commands that the pages show, as a reader would type them, and whether the program knows them."""

import argparse
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import yaml
from markdown_it import MarkdownIt
from omegaconf import OmegaConf

from megacell.core.cli.main import build_parser
from megacell.training.config.settings import compose, config_dirs

ROOT = Path(__file__).resolve().parents[1]
PROMPT = "$ "
OURS = re.compile(r"^(megacell|(torchrun|srun|docker run)\b.*\bmegacell)\b")
STARTS = re.compile(r"^megacell($|:)")  # the word before our own arguments
REFUSED = re.compile(r"^megacell [\w ]+: error: ")
COMMENT = re.compile(r"\s+#\s.*$")
GIVEN = ("store=s", "vocabulary=v", "out=o")  # options that have to be given, where a page leaves them out


@dataclass(frozen=True)
class Shown:
    """A command of a page.

    Attributes
    ----------
    page : str
    line : int
        Of the block that it stands in, from 1.
    text : str
        As a shell takes it, without its prompt and comment.
    refused : str
        The error that the page shows below it; "" for a command that succeeds.
    """

    page: str
    line: int
    text: str
    refused: str = ""

    def __str__(self) -> str:
        return f"{self.page}:{self.line}: {self.text}"

    @property
    def words(self) -> list[str]:
        """What stands behind `megacell`, whatever starts it; without what stands for more words."""
        words = shlex.split(self.text)
        start = next(number for number, word in enumerate(words) if STARTS.match(word))
        return [word for word in words[start + 1 :] if word != "…"]


def commands(page: Path) -> list[Shown]:
    """Return the commands in a page's code blocks, in their order."""
    tokens = MarkdownIt("commonmark").parse(page.read_text())
    blocks = [token for token in tokens if token.type in ("fence", "code_block")]
    return [found for block in blocks for found in _commands(page.name, block.map[0] + 1, block.content)]


def _commands(page: str, number: int, block: str) -> Iterator[Shown]:
    lines = re.sub(r"\\\n\s*", "", block).splitlines()
    prompted = any(line.startswith(PROMPT) for line in lines)
    for place, line in enumerate(lines):
        if line.startswith(PROMPT) is prompted and OURS.match(text := line.removeprefix(PROMPT)):
            below = "".join(lines[place + 1 : place + 2])
            yield Shown(page, number, COMMENT.sub("", text), below if REFUSED.match(below) else "")


def spans(page: Path) -> list[str]:
    """Return what stands as code within a page's sentences and tables."""
    tokens = MarkdownIt("commonmark").enable("table").parse(page.read_text())
    inline = [child for token in tokens for child in token.children or [] if child.type == "code_inline"]
    return [child.content for child in inline]


def check(shown: Shown) -> None:
    """Parse a command as the program does; SystemExit or UsageError if it does not know it."""
    args = build_parser().parse_args(shown.words)
    if shown.words[0] == "pretrain":
        settings = [_single(each) for each in args.settings if each != "resume=true"]
        names = {each.split("=")[0] for each in settings}
        compose([*settings, *(each for each in GIVEN if each.split("=")[0] not in names)])


def _single(setting: str) -> str:
    """Return the first of several values that `--multirun` tries."""
    name, _, value = setting.partition("=")
    return setting if value[:1] in "[{" else f"{name}={value.split(',')[0]}"


def unknown(span: str) -> list[str]:
    """Return the words of a span such as `megacell convert --append` that name no command and no option."""
    parser, found = build_parser(), []
    for word in span.split()[1:]:
        below = next((a for a in parser._actions if isinstance(a, argparse._SubParsersAction)), None)
        if below and word in below.choices:
            parser = below.choices[word]
        elif word.startswith("--"):
            found += [] if word in parser._option_string_actions else [word]
        elif below and word.islower():
            found.append(word)
        if parser.prog.endswith("pretrain") and "=" in word:
            found += [] if word.split("=")[0] in settings() else [word]
    return found


@cache
def options() -> set[str]:
    """Return the options of all sub-commands."""
    found, parsers = set(), [build_parser()]
    while parsers:
        for action in parsers.pop()._actions:
            found |= set(action.option_strings)
            if isinstance(action, argparse._SubParsersAction):
                parsers += action.choices.values()
    return found


@cache
def settings() -> set[str]:
    """Return the names of all options of `megacell pretrain`, and of the groups that they are in."""
    names = _names(OmegaConf.to_container(compose(list(GIVEN)))) | {"experiment", "sweep"}
    for path in [path for folder in config_dirs() for path in folder.glob("*/*.yaml")]:
        if path.parent.name in ("launcher", "logger"):
            names |= {f"{path.parent.name}.{name}" for name in _names(yaml.safe_load(path.read_text()))}
    return names


def _names(tree: dict) -> set[str]:
    below = {f"{name}.{each}" for name, value in tree.items() if isinstance(value, dict) for each in _names(value)}
    return set(tree) | below
