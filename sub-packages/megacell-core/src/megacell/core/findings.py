# SPDX-License-Identifier: Apache-2.0
"""The findings of `megacell doctor`: one fact a line, and how to fix what is wrong."""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

OK, WARNING, WRONG = "ok", "warning", "wrong"
_MARKS = {OK: ("", "  "), WARNING: ("yellow", "! "), WRONG: ("red", "x ")}


@dataclass(frozen=True)
class Finding:
    """One fact.

    Attributes
    ----------
    topic, name, value : str
        "versions", "torch", "2.13.0".
    state : {"ok", "warning", "wrong"}
        wrong: something of Megacell will not work.
    fix : str
        What to do about it; "" where nothing is to be done.
    """

    topic: str
    name: str
    value: str
    state: str = OK
    fix: str = ""


def will_work(findings: Iterable[Finding]) -> bool:
    """Return whether nothing is wrong."""
    return all(finding.state != WRONG for finding in findings)


def to_json(findings: Sequence[Finding]) -> dict[str, Any]:
    """Return all findings in JSON's types."""
    return {"will_work": will_work(findings), "findings": [asdict(finding) for finding in findings]}


def show(findings: Sequence[Finding]) -> None:
    """Print findings by topic, a fix below what it is for; in colours on a terminal."""
    from rich.console import Console
    from rich.text import Text

    console = Console(soft_wrap=True, highlight=False)
    width = max((len(finding.name) for finding in findings), default=0)
    for topic in dict.fromkeys(finding.topic for finding in findings):
        console.print(Text(f"\n{topic}", "bold"))
        for finding in (each for each in findings if each.topic == topic):
            colour, mark = _MARKS[finding.state]
            console.print(Text(f"{mark}{finding.name:<{width}}  {finding.value}", colour))
            if finding.fix:
                console.print(Text(f"  {'':<{width}}  {finding.fix}", colour))
    console.print(Text(f"\n{_verdict(findings)}", "bold"))


def _verdict(findings: Sequence[Finding]) -> str:
    wrong, warnings = (sum(finding.state == state for finding in findings) for state in (WRONG, WARNING))
    return f"{wrong} wrong (x), {warnings} to look at (!)" if wrong or warnings else "all is well"
