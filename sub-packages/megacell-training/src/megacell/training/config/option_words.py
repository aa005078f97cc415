# SPDX-License-Identifier: Apache-2.0
"""The names of all options of `megacell pretrain`, and the values of those that are chosen from a list."""

from collections.abc import Iterator
from typing import Any


def option_words() -> dict[str, list[str]]:
    """Return each option's name, as it is typed before "=", with its values; none where anything may stand there."""
    from hydra import compose
    from omegaconf import OmegaConf

    from megacell.training.config.settings import SCHEDULES, config_dirs, hydra_configs, searchpath
    from megacell.training.family import find_family

    groups: dict[str, list[str]] = {}
    for file in sorted(file for folder in config_dirs() for file in folder.glob("*/*.yaml")):
        groups.setdefault(file.parent.name, []).append(file.stem)
    with hydra_configs(find_family()):
        options = dict(_leaves(OmegaConf.to_container(compose("pretrain", [searchpath()]))))
    found = {name: ["true", "false"] if isinstance(value, bool) else [] for name, value in options.items()}
    groups = {name: sorted(values) for name, values in sorted(groups.items())}
    return {**groups, **found, "optim.schedule": list(SCHEDULES)}


def _leaves(tree: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
