# SPDX-License-Identifier: Apache-2.0
"""The store's sub-commands of `megacell`."""

from typing import Any


def register(commands: Any) -> None:
    """Add `convert`, `info` and `verify`."""
