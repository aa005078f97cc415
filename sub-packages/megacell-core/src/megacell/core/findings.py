# SPDX-License-Identifier: Apache-2.0
"""What `megacell doctor` finds: one fact a line, and a mend where something is wrong."""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, requires, version
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
    mend : str
        What to do about it; "" where nothing is to be done.
    """

    topic: str
    name: str
    value: str
    state: str = OK
    mend: str = ""


def package_versions(distributions: Sequence[str], shown: Sequence[str], optional: Sequence[str]) -> list[Finding]:
    """Return the versions of packages, without importing any, and whether a distribution of ours admits them.

    Parameters
    ----------
    distributions : sequence of str
        Ours, whose requirements are looked at; those that are not installed are passed over.
    shown : sequence of str
        Packages to name although nothing is wrong; of the others only what is wrong is told.
    optional : sequence of str
        Packages that are used where they are there.
    """
    needs = {need.name: need for name in distributions for need in _requirements(name)}
    found = []
    for name in dict.fromkeys((*shown, *needs)):
        installed, need = _version(name), needs.get(name)
        if installed and (need is None or need.specifier.contains(installed, prereleases=True)):
            found += [Finding("versions", name, installed)] if name in shown else []
        elif need is not None:
            text = f"{installed or 'not installed'}, Megacell needs {need.specifier}"
            found.append(Finding("versions", name, text, WRONG, f"pip install '{need.name}{need.specifier}'"))
    return found + [Finding("versions", name, _version(name) or "not installed (optional)") for name in optional]


def _requirements(distribution: str) -> list[Any]:
    from packaging.requirements import Requirement

    try:
        lines = requires(distribution) or []
    except PackageNotFoundError:
        return []
    return [need for need in map(Requirement, lines) if need.marker is None or need.marker.evaluate({"extra": ""})]


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def will_work(findings: Iterable[Finding]) -> bool:
    """Return whether nothing is wrong."""
    return all(finding.state != WRONG for finding in findings)


def to_json(findings: Sequence[Finding]) -> dict[str, Any]:
    """Return all findings as JSON has them."""
    return {"will_work": will_work(findings), "findings": [asdict(finding) for finding in findings]}


def show(findings: Sequence[Finding]) -> None:
    """Print findings by topic, a mend below what it mends; in colours on a terminal."""
    from rich.console import Console
    from rich.text import Text

    console = Console(soft_wrap=True, highlight=False)
    wide = max((len(finding.name) for finding in findings), default=0)
    for topic in dict.fromkeys(finding.topic for finding in findings):
        console.print(Text(f"\n{topic}", "bold"))
        for finding in (each for each in findings if each.topic == topic):
            colour, mark = _MARKS[finding.state]
            console.print(Text(f"{mark}{finding.name:<{wide}}  {finding.value}", colour))
            if finding.mend:
                console.print(Text(f"  {'':<{wide}}  {finding.mend}", colour))
    counts = {state: sum(finding.state == state for finding in findings) for state in (WARNING, WRONG)}
    verdict = (
        f"\n{counts[WRONG]} wrong (x), {counts[WARNING]} to look at (!)" if any(counts.values()) else "\nall is well"
    )
    console.print(Text(verdict, "bold"))
