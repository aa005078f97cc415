# SPDX-License-Identifier: Apache-2.0
"""Write constraints for an image that brings packages of its own: those stay as they are, ours hold for all others.

    python constrain.py constraints.txt kept.txt

A package whose version has a local part (torch 2.11.0a0+…nv26.03) is the image's own build, which no index could give
back: it is pinned, so that an installation fails rather than replaces it.
"""

import re
import sys
from importlib.metadata import distributions
from pathlib import Path


def canonical(name: str) -> str:
    """Return a distribution's name as indexes compare it (PEP 503)."""
    return re.sub(r"[-_.]+", "-", name).lower()


def constrain(ours: list[str], installed: dict[str, str]) -> list[str]:
    """Return the lines of a constraints file.

    Parameters
    ----------
    ours : list of str
        ``name==version``, comments and empty lines.
    installed : dict of str
        Version of each package of the image, by canonical name.
    """
    kept = [f"{name}=={version}" for name, version in sorted(installed.items()) if "+" in version]
    pins = [line.strip() for line in ours if "==" in line and not line.startswith("#")]
    return kept + [pin for pin in pins if canonical(pin.split("==")[0]) not in installed]


if __name__ == "__main__":
    given, out = map(Path, sys.argv[1:])
    here = {canonical(each.metadata["Name"]): each.version for each in distributions()}
    if "torch" not in here:
        sys.exit("constrain.py: no torch here: this image is not one of PyTorch's")
    out.write_text("\n".join(constrain(given.read_text().splitlines(), here)) + "\n")
