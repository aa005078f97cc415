# SPDX-License-Identifier: Apache-2.0
"""What a conversion imports and compiles before it forks."""

from functools import cache


@cache
def prepare() -> None:
    """Import and compile here what a forked process needs, so that none does it again."""
    import anndata.io  # noqa: F401

    from megacell.store.format.canonical import compile_all

    compile_all()
