# SPDX-License-Identifier: Apache-2.0
"""Unites the sub-packages' dependencies and commands in the whole, and ties a sub-package to others of its version."""

import tomllib
from pathlib import Path

from hatchling.metadata.plugin.interface import MetadataHookInterface

ROOT = Path(__file__).resolve().parent
OWN = "megacell-"


class CustomMetadataHook(MetadataHookInterface):
    def update(self, metadata: dict) -> None:
        if Path(self.root).resolve() == ROOT:
            _unite(metadata)
        else:
            version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
            needs = metadata["dependencies"]
            metadata["dependencies"] = [f"{need}=={version}" if need.startswith(OWN) else need for need in needs]


def _unite(metadata: dict) -> None:
    projects = [tomllib.loads(p.read_text())["project"] for p in sorted(ROOT.glob("sub-packages/*/pyproject.toml"))]
    needs = {need for project in projects for need in project["dependencies"] if not need.startswith(OWN)}
    metadata["dependencies"] = sorted(needs)
    for field in ("scripts", "entry-points", "optional-dependencies"):
        united: dict = {}
        for project in projects:
            merge(united, project.get(field, {}), field)
        metadata[field] = united


def merge(united: dict, more: dict, field: str) -> None:
    """Add a sub-package's table: tables within it are merged, lists joined; a name can stand for one thing only."""
    for key, value in more.items():
        if isinstance(value, dict):
            merge(united.setdefault(key, {}), value, f"{field}.{key}")
        elif isinstance(value, list):
            united[key] = list(dict.fromkeys([*united.get(key, []), *value]))
        elif united.setdefault(key, value) != value:
            raise ValueError(f"{field}: two sub-packages have {key!r}: {united[key]} and {value}")
