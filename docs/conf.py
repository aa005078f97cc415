# SPDX-License-Identifier: Apache-2.0
"""How Sphinx makes the site of these pages: nothing is fetched, nothing is run, notebooks show what they printed."""

import re
import tomllib
from pathlib import Path
from typing import Any

from sphinx.ext.autodoc.mock import _MockObject

ROOT = Path(__file__).resolve().parents[1]

project = "Megacell"
author = "The Megacell authors"
version = release = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]
highlight_language = "none"  # of indented blocks, which are commands and what they print

nb_execution_mode = "off"
nb_merge_streams = True
myst_heading_anchors = 3  # links to headings, as GitHub makes them

autodoc_mock_imports = ["lightning", "megatron", "nemo"]  # their import takes longer than all the rest
_MockObject.__or__ = _MockObject.__ror__ = lambda mocked, other: object  # annotations such as `PackedSeqParams | None`
autodoc_member_order = "bysource"
autodoc_typehints = "none"  # the docstrings tell shapes and types
napoleon_google_docstring = False
napoleon_use_ivar = True
napoleon_use_rtype = False

html_theme = "furo"
html_title = f"Megacell {version}"
html_show_copyright = False
html_copy_source = False


def contents(index: str) -> str:
    """Return the site's contents as the tables in index.md list them: pages stand there once, for GitHub too."""
    trees = ""
    for caption, table in re.findall(r"^### (.+)\n\n((?:\|.*\n)+)", index, re.MULTILINE):
        pages = re.findall(r"^\| \[.+?\]\((.+?)\.(?:md|ipynb)\) \|", table, re.MULTILINE)
        trees += "\n".join(["", "```{toctree}", ":hidden:", f":caption: {caption}", "", *pages, "```", ""])
    return trees


def _add_contents(app: Any, page: str, source: list[str]) -> None:
    if page == "index":
        source[0] += contents(source[0])


def _keep_in_one_line(app: Any, what: str, name: str, thing: Any, options: Any, lines: list[str]) -> None:
    """Keep napoleon from taking what stands before a colon for a property's type."""
    if what == "property" and lines:
        lines[0] = lines[0].replace(": ", ", ", 1)


def setup(app: Any) -> None:
    """Have Sphinx add the contents when it reads index.md, and read properties as they are written."""
    app.connect("source-read", _add_contents)
    app.connect("autodoc-process-docstring", _keep_in_one_line, priority=400)  # before napoleon
