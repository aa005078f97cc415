# SPDX-License-Identifier: Apache-2.0
"""A report as one HTML file that prints well and needs nothing else: no scripts, no fonts, nothing from elsewhere."""

from collections.abc import Sequence
from html import escape
from pathlib import Path

from megacell.core.errors import UsageError
from megacell.core.files import write_whole

_STYLE = """\
:root { color-scheme: light dark; --text: #1a1a1a; --soft: #555; --ground: #fff; --rule: #ccc; --faint: #eee;
  --panel: #f6f6f6; --axis: #333; --grid: #e6e6e6; }
@media screen and (prefers-color-scheme: dark) {
  :root { --text: #e8e8e8; --soft: #a8a8a8; --ground: #16181c; --rule: #444; --faint: #2a2d33; --panel: #1f2228;
    --axis: #bbb; --grid: #33363d; }
}
* { box-sizing: border-box; }
body { font: 15px/1.45 system-ui, "Liberation Sans", Arial, sans-serif; color: var(--text); background: var(--ground);
  max-width: 1000px; margin: 0 auto; padding: 24px; }
h1 { font-size: 26px; margin: 0 0 2px; overflow-wrap: anywhere; }
h2 { font-size: 18px; margin: 34px 0 8px; border-bottom: 1px solid var(--rule); padding-bottom: 3px;
  break-after: avoid; }
p { margin: 6px 0; max-width: 75ch; }
.about, figcaption, .note { color: var(--soft); }
.figures { display: grid; grid-template-columns: repeat(auto-fill, minmax(400px, 1fr)); gap: 18px 28px; }
figure { margin: 0; break-inside: avoid; }
figcaption { font-weight: 600; color: var(--text); margin-bottom: 4px; }
figure > svg { width: 100%; height: auto; display: block; }
svg text { font: 11px system-ui, "Liberation Sans", Arial, sans-serif; fill: var(--axis); }
.grid { stroke: var(--grid); fill: none; }
.axis { stroke: var(--axis); fill: none; }
.reference { stroke: var(--soft); stroke-width: 1.5; fill: none; }
.line { stroke-width: 1.6; fill: none; stroke-linejoin: round; }
.keys { list-style: none; margin: 2px 0 0; padding: 0; font-size: 0.87em; }
.keys { display: flex; flex-wrap: wrap; gap: 2px 16px; }
.key { width: 24px; height: 10px; margin-right: 6px; vertical-align: middle; display: inline-block; }
.key.dot { width: 10px; }
.facts { display: grid; grid-template-columns: repeat(auto-fill, minmax(170px, 1fr)); gap: 12px; margin: 14px 0; }
.facts div { background: var(--panel); padding: 8px 12px; border-radius: 4px; break-inside: avoid; }
.facts dt { color: var(--soft); font-size: 0.87em; }
.facts dd { margin: 0; }
.facts dd.value { font-size: 21px; font-variant-numeric: tabular-nums; }
table { border-collapse: collapse; margin: 8px 0; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: 3px 18px 3px 0; vertical-align: top; border-bottom: 1px solid var(--faint); }
td.number, th.number { text-align: right; white-space: nowrap; }
tr { break-inside: avoid; }
td { overflow-wrap: break-word; }
td:last-child { overflow-wrap: anywhere; }
pre { background: var(--panel); padding: 10px 12px; font: 12px/1.4 ui-monospace, "Liberation Mono", monospace;
  white-space: pre-wrap; overflow-wrap: anywhere; }
@media print {
  body { font-size: 11px; max-width: none; padding: 0; }
  .figures { grid-template-columns: 1fr 1fr; }
  pre { font-size: 9px; }
  * { print-color-adjust: exact; -webkit-print-color-adjust: exact; }
  @page { margin: 14mm; }
}
"""
_HTML = """\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>{title}</title>
<style>
{style}</style>
</head>
<body>
{body}
</body>
</html>
"""


class Page:
    """A page that grows section by section.

    Parameters
    ----------
    title : str
    about : str
        One line below it.
    """

    def __init__(self, title: str, about: str) -> None:
        self.title = title
        self._parts = [f"<h1>{escape(title)}</h1>", f'<p class="about">{escape(about)}</p>']

    def facts(self, facts: Sequence[tuple[str, str, str]]) -> None:
        """Add the figures that matter most, each a name, a value, and a line that puts it in relation ("": none)."""
        parts = []
        for name, value, beside in facts:
            more = f'<dd class="note">{escape(beside)}</dd>' if beside else ""
            parts.append(f'<div><dt>{escape(name)}</dt><dd class="value">{escape(value)}</dd>{more}</div>')
        self._parts.append(f'<dl class="facts">{"".join(parts)}</dl>')

    def section(self, title: str) -> None:
        """Begin a section."""
        self._parts.append(f"<h2>{escape(title)}</h2>")

    def text(self, text: str, *, note: bool = False) -> None:
        """Add a paragraph."""
        self._parts.append(f"<p{' class=note' if note else ''}>{escape(text)}</p>")

    def block(self, text: str) -> None:
        """Add a text that keeps its lines, as a file's."""
        self._parts.append(f"<pre>{escape(text)}</pre>")

    def figures(self, drawn: dict[str, str]) -> None:
        """Add SVGs by their captions, two beside each other on a wide page; empty ones are skipped."""
        parts = [f"<figure><figcaption>{escape(name)}</figcaption>{one}</figure>" for name, one in drawn.items() if one]
        if parts:
            self._parts.append(f'<div class="figures">{"".join(parts)}</div>')

    def table(self, head: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
        """Add a table; whole numbers are set to the right with their thousands apart. An empty head is skipped."""
        cells = [[_cell(value) for value in row] for row in rows]
        right = [all(isinstance(row[i], int) for row in rows) for i in range(len(rows[0]))] if rows else []
        if any(head):
            names = "".join(
                f"<th{' class=number' if r else ''}>{escape(h)}</th>" for h, r in zip(head, right, strict=False)
            )
            names = f"<thead><tr>{names}</tr></thead>"
        else:
            names = ""
        body = "".join(f"<tr>{''.join(row)}</tr>" for row in cells)
        self._parts.append(f"<table>{names}<tbody>{body}</tbody></table>")

    def html(self) -> str:
        """Return the whole page."""
        body = "\n".join(self._parts)
        return _HTML.format(title=escape(self.title), style=_STYLE, body=body)

    def write(self, path: Path) -> None:
        """Write the page, whole or not at all.

        Raises
        ------
        UsageError
            If its folder is not there.
        """
        if not path.parent.is_dir():
            raise UsageError(f"{path}: no folder {path.parent}; make it, or name another file")
        write_whole(path, self.html().encode())


def _cell(value: object) -> str:
    if isinstance(value, int):
        return f'<td class="number">{value:,}</td>'
    return f"<td>{escape(str(value))}</td>"
