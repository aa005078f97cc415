# SPDX-License-Identifier: Apache-2.0
"""The sub-commands of the store; each imports what is slow to import when it runs."""

from typing import Any

from megacell.store.commands.bench import register_bench
from megacell.store.commands.compact import register_compact
from megacell.store.commands.convert import register_convert
from megacell.store.commands.info import register_info
from megacell.store.commands.overlap import register_overlap
from megacell.store.commands.scdl import register_scdl
from megacell.store.commands.verify import register_verify


def register(commands: Any) -> None:
    """Add this package's sub-commands to argparse's sub-parsers."""
    register_convert(commands)
    register_compact(commands)
    register_scdl(commands)
    register_bench(commands)
    register_info(commands)
    register_verify(commands)
    register_overlap(commands)
