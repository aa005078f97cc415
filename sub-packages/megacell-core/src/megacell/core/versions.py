# SPDX-License-Identifier: Apache-2.0
"""Versions of Megacell, of Python and of other packages, and whether Megacell admits them; imports none of them."""

import sys
from collections.abc import Iterable, Sequence
from importlib.metadata import PackageNotFoundError, entry_points, metadata, requires, version
from typing import Any

from megacell.core.findings import WRONG, Finding

COMMANDS = "megacell.commands"  # entry-point group: functions that take argparse's sub-parsers and add their own
CHECKS = "megacell.doctor"  # entry-point group: functions that take whether to be quick and return findings
_TOPIC = "versions"


def own_distributions() -> list[str]:
    """Return the installed distributions of Megacell: "megacell" is all of it, else each sub-package has its own.

    A sub-package is known by its entry points, so that this one need not name those above it.
    """
    points = [point for group in (COMMANDS, CHECKS) for point in entry_points(group=group)]
    names = {"megacell", "megacell-core", *(point.dist.name for point in points if point.dist)}
    return sorted(name for name in names if version_of(name))


def version_of(distribution: str) -> str | None:
    """Return the version of an installed distribution, or None."""
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def installed_version() -> str:
    """Return Megacell's version, or "unknown" where it is run without having been installed."""
    return next(filter(None, map(version_of, ("megacell", "megacell-core"))), "unknown")


def python_version() -> Finding:
    """Return Python's version, and whether Megacell admits it."""
    from packaging.specifiers import SpecifierSet

    running = ".".join(map(str, sys.version_info[:3]))
    for bounds in (metadata(name)["Requires-Python"] for name in own_distributions()):
        if bounds and not SpecifierSet(bounds).contains(running):
            fix = f"Megacell needs Python {bounds}: make another environment"
            return Finding(_TOPIC, "python", running, WRONG, fix)
    return Finding(_TOPIC, "python", running)


def package_versions(distributions: Sequence[str], shown: Sequence[str], optional: Sequence[str] = ()) -> list[Finding]:
    """Return the versions of packages, and whether a distribution of Megacell admits them.

    Parameters
    ----------
    distributions : sequence of str
        Those whose requirements are checked, as `own_distributions` returns them.
    shown : sequence of str
        Packages to list where they are installed; of the others only those with a wrong version are listed.
    optional : sequence of str
        Packages to list whether they are installed or not.
    """
    needs = _requirements(distributions)
    found = []
    for name in dict.fromkeys((*shown, *needs)):
        installed, bounds = version_of(name), needs.get(name)
        if installed and (bounds is None or bounds.contains(installed, prereleases=True)):
            found += [Finding(_TOPIC, name, installed)] if name in shown else []
        elif bounds is not None:
            text = f"{installed or 'not installed'}, Megacell needs {bounds or 'it'}"
            found.append(Finding(_TOPIC, name, text, WRONG, f"pip install '{name}{bounds}'"))
    return found + [Finding(_TOPIC, name, version_of(name) or "not installed (optional)") for name in optional]


def _requirements(distributions: Iterable[str]) -> dict[str, Any]:
    """Return what distributions need, their bounds on one package taken together: SpecifierSet by name."""
    from packaging.requirements import Requirement
    from packaging.specifiers import SpecifierSet

    needs: dict[str, Any] = {}
    for name in filter(version_of, distributions):
        for need in map(Requirement, requires(name) or []):
            if need.marker is None or need.marker.evaluate({"extra": ""}):
                needs[need.name] = needs.get(need.name, SpecifierSet()) & need.specifier
    return needs
