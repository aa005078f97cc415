# SPDX-License-Identifier: Apache-2.0
"""The place where one command is tried again and again: its folder as it was before, and what it makes undisturbed."""

import shutil
from dataclasses import dataclass, field
from pathlib import Path

import ground
from scenarios import Scenario, Words
from shim import CALLS, Order, Page
from tries import Ended, Tries

LIMIT = 60.0  # seconds within which a command has to end by itself, beside a multiple of what it takes undisturbed
TIMES = 4.0
NOTHING = Order()


@dataclass
class Tally:
    """What became of the tries of a command.

    Attributes
    ----------
    kind, command : str
    tried, hit : int
        Tries, and those of them that met a living process or a call.
    left : int
        Tries after which, in the end, files were left behind that the undisturbed command does not leave.
    lost : list of str
        A line for each try after which something was lost, wrong, or hung.
    seconds : float
    """

    kind: str
    command: str
    tried: int = 0
    hit: int = 0
    left: int = 0
    lost: list[str] = field(default_factory=list)
    seconds: float = 0.0


@dataclass(frozen=True)
class Reference:
    """A command undisturbed: states shown before and after, what it ends with, its calls, and seconds."""

    before: str
    after: str
    content: dict[str, str]
    counts: dict[str, int]
    seconds: float

    @property
    def calls(self) -> int:
        """Return how many calls it makes that change files."""
        return sum(self.counts.values())


class Bench:
    """Tries of one command.

    Parameters
    ----------
    scenario : Scenario
    folder : Path
        For all that is written.
    names : dict of str to Path
        The ground's files.
    page : Page
    """

    def __init__(self, scenario: Scenario, folder: Path, names: dict[str, Path], page: Page):
        self.scenario, self.names = scenario, names
        self.tries = Tries(folder, page)
        self._template, self.place = folder / "template", folder / "try"  # always the same: paths are in some files
        self.reference = self._undisturbed()

    def fresh(self) -> None:
        """Lay out the folder as it is before the command."""
        shutil.rmtree(self.place, ignore_errors=True)
        shutil.copytree(self._template, self.place)

    def run(self, order: Order = NOTHING, *, again: bool = False, signal_after: float | None = None) -> Ended:
        """Run the command, or what goes on with it, and do at it what is ordered."""
        limit = LIMIT + TIMES * self.reference.seconds
        work = self._work(self.scenario.again(self.place) if again and self.scenario.again else self.scenario.words)
        return self.tries.command(work, self.place, order, limit=limit, signal_after=signal_after)

    def shown(self) -> str:
        """Return the state that a user meets now."""
        return str(self.tries.ask(lambda: self.scenario.shown(self.place)))

    def content(self) -> dict[str, str]:
        """Return what is there now by name."""
        found = self.tries.ask(lambda: self.scenario.content(self.place))
        return found if isinstance(found, dict) else {"": str(found)}

    def finish(self, shown: str) -> str:
        """Let the command go on to its end, unless it is done; return a complaint about what it ends with, or ""."""
        if shown != self.reference.after or self.scenario.repeatable:
            ended = self.run(again=True)
            if ended.code != 0:
                return f"again: exit code {ended.code}: {ended.err.strip()[-400:]}"
        if complaint := self.tries.leftovers():
            return complaint
        found, expected = self.content(), self.reference.content
        wrong = sorted(name for name in expected if found.get(name) != expected[name])
        strange = sorted(name for name in found if name not in expected and not _is_temporary(name))
        return f"in the end these differ: {wrong[:6]} {strange[:6]} {found.get('', '')}" if wrong or strange else ""

    def left_behind(self) -> list[str]:
        """Return the temporary files and folders that are there now, and were not left by the undisturbed command."""
        return sorted(self._temporaries() - self._left)

    def _temporaries(self) -> set[str]:
        paths = (path.relative_to(self.place) for path in self.place.rglob("*"))
        return {str(path) for path in paths if path.parts[0] != "cache" and _is_temporary(path.name)}

    def _work(self, words: Words):
        def work() -> int:
            from megacell.core.cli.main import main

            self.scenario.settle()
            if self.scenario.work:
                return self.scenario.work(self.place)
            return main(ground.fill(words, self.names))

        return work

    def _undisturbed(self) -> Reference:
        """Make the template, and run the command twice: both have to end alike."""
        shutil.rmtree(self._template, ignore_errors=True)
        shutil.rmtree(self.place, ignore_errors=True)
        self.place.mkdir(parents=True)
        self.reference = Reference("", "", {}, dict.fromkeys(CALLS, 0), 30.0)
        for words in self.scenario.before:
            self._succeed(words)
        before = self.shown()
        shutil.copytree(self.place, self._template)
        first, second = (self._reference(before) for _ in range(2))
        differing = sorted(k for k in first.content if first.content[k] != second.content.get(k))
        if differing or first.after != second.after:
            raise AssertionError(f"{self.scenario.name}: two undisturbed runs differ: {differing}")
        return second

    def _reference(self, before: str) -> Reference:
        self.fresh()
        ended = self._succeed(self.scenario.words)
        self._left = self._temporaries()
        return Reference(before, self.shown(), self.content(), ended.seen.counts, ended.seconds)

    def _succeed(self, words: Words) -> Ended:
        ended = self.tries.command(self._work(words), self.place, NOTHING, limit=10 * LIMIT)
        if ended.code != 0:
            raise AssertionError(f"{words}: exit code {ended.code}\n{ended.out}\n{ended.err}")
        return ended


def _is_temporary(name: str) -> bool:
    return any(part.startswith(".") or ".tmp" in part for part in Path(name).parts)
