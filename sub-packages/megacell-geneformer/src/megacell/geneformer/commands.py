# SPDX-License-Identifier: Apache-2.0
"""Geneformer's sub-commands of `megacell`; nothing heavy is imported before a command runs."""


def register(commands) -> None:
    """Add the sub-commands to argparse's sub-parsers."""
