# SPDX-License-Identifier: Apache-2.0
"""The names of all options of `megacell pretrain`, and the values of those that are chosen from a list."""

from collections.abc import Iterator
from typing import Any


def option_words() -> dict[str, list[str]]:
    """Return each option's name, as it is typed before "=", with its values; none where anything may stand there."""
    from hydra import compose, initialize_config_dir
    from omegaconf import OmegaConf

    from megacell.training.config.settings import SCHEDULES, config_dir

    folder = config_dir()
    groups = {
        group.name: sorted(file.stem for file in group.glob("*.yaml"))
        for group in sorted(folder.iterdir())
        if group.is_dir()
    }
    with initialize_config_dir(str(folder), version_base="1.3"):
        options = dict(_leaves(OmegaConf.to_container(compose("pretrain"))))
    found = {name: ["true", "false"] if isinstance(value, bool) else [] for name, value in options.items()}
    return {**groups, **found, "optim.schedule": list(SCHEDULES)}


def _leaves(tree: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
