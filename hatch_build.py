# SPDX-License-Identifier: Apache-2.0
"""Unites the sub-packages' version, dependencies and commands, so that each stands in one place only."""

import tomllib
from pathlib import Path

from hatchling.metadata.plugin.interface import MetadataHookInterface


class CustomMetadataHook(MetadataHookInterface):
    def update(self, metadata: dict) -> None:
        root = Path(self.root) / "sub-packages"
        projects = [tomllib.loads(p.read_text())["project"] for p in sorted(root.glob("*/pyproject.toml"))]
        (metadata["version"],) = {project["version"] for project in projects}
        own = {project["name"] for project in projects}
        needs = {d for project in projects for d in project["dependencies"] if d.split("==")[0] not in own}
        metadata["dependencies"] = sorted(needs)
        for field in ("scripts", "entry-points", "optional-dependencies"):
            united: dict = {}
            for project in projects:
                for key, value in project.get(field, {}).items():
                    if isinstance(value, dict):
                        united.setdefault(key, {}).update(value)
                    elif isinstance(value, list):
                        united.setdefault(key, []).extend(v for v in value if v not in united.get(key, []))
                    else:
                        united[key] = value
            metadata[field] = united
