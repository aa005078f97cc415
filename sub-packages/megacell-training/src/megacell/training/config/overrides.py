# SPDX-License-Identifier: Apache-2.0
"""Options as they are typed: Hydra reads values by a grammar of its own, in which many a path means something else."""

import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

QUOTES = ("'", '"')


def key_of(override: str) -> str:
    """Return the option that an override sets."""
    return override.split("=", 1)[0].lstrip("+~")


def value_of(override: str) -> str:
    """Return the value that an override gives, without quotes around it."""
    value = override.partition("=")[2]
    if len(value) > 1 and value[0] in QUOTES and value[-1] == value[0]:
        return re.sub(rf"(\\+)({value[0]}|$)", lambda found: found[1][: len(found[1]) // 2] + found[2], value[1:-1])
    return value


def quoted(override: str, texts: Collection[str], *, several: bool = False) -> str:
    """Return an override as Hydra has to be told it, where its value is a text that is meant as it stands.

    Parameters
    ----------
    override : str
        ``store=data/donor=3,b/cells store``.
    texts : collection of str
        Options whose values are paths or other texts; the others are returned as they are, and so is what has quotes.
    several : bool
        Commas may separate several values: so it is taken where each of them is there, and the whole is not.
    """
    key, equals, value = override.partition("=")
    if key.lstrip("+~") not in texts or not equals or value in ("", "null", "???") or value[0] in QUOTES:
        return override
    parts = value.split(",")
    if several and len(parts) > 1 and not Path(value).exists() and all(Path(part).exists() for part in parts):
        return override
    escaped = re.sub(r"(\\*)'", lambda found: 2 * found[1] + r"\'", value)  # only backslashes before a quote count
    trailing = len(escaped) - len(escaped.rstrip("\\"))
    return f"{key}='{escaped}{trailing * chr(92)}'"


def parsed(overrides: list[str]) -> list[tuple[str, Any]]:
    """Return options and values as Hydra reads them; each is one value, no sweep.

    Raises
    ------
    hydra.errors.HydraException
        A value that its grammar does not know.
    """
    from hydra.core.override_parser.overrides_parser import OverridesParser

    return [(each.key_or_group, each.value()) for each in OverridesParser.create().parse_overrides(overrides)]
