# SPDX-License-Identifier: Apache-2.0
"""Draws the rooms of the source into images/rooms.svg, and lists them and their files in architecture.md.

    make rooms

Both are made from what tests/doors.py reads. tests/test_doors.py checks the imports, and that both are up to date.
"""

import sys
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from doors import NAMESPACE, PACKAGES, House, by_folder, reachable, read_house, rooms  # noqa: E402

PICTURE = ROOT / "docs" / "images" / "rooms.svg"
PAGE = ROOT / "docs" / "architecture.md"
BEGIN, END = "<!-- rooms: written by draw_rooms.py -->", "<!-- rooms: end -->"

WIDTH, MARGIN = 1000, 14  # of the picture; around what is in it
LANES = 68  # width at the right, for the arrows between packages
LANE = 14  # between two of them
ROOM_HEIGHT, FILE_HEIGHT, PASS_HEIGHT = 42, 26, 12  # of a room, of a file, of an arrow that passes between them
GAP = 10  # between boxes of a column
HEAD, BAND_GAP = 34, 16  # of a package, with its name; between packages
LETTER = 7.0  # width of a letter

STYLE = """
    .ground { fill: #ffffff } text { fill: #222222 } .small { fill: #666666; font-size: 11px }
    .name { font-size: 15px; font-weight: bold } .arrow { stroke: #8a8a8a; fill: none } .tip { fill: #8a8a8a }
    .core { fill: #f2f2f2; stroke: #777777 } .store { fill: #eef4fb; stroke: #4477aa }
    .training { fill: #eef7ee; stroke: #3a7d44 } .geneformer { fill: #fbf3e6; stroke: #bb7722 }
    .room { fill: #ffffff; stroke: #888888 }
    @media (prefers-color-scheme: dark) {
      .ground { fill: #15181c } text { fill: #e8e8e8 } .small { fill: #aaaaaa } .arrow { stroke: #9a9a9a }
      .tip { fill: #9a9a9a } .core { fill: #25282c } .store { fill: #1b2733 } .training { fill: #1c2a1f }
      .geneformer { fill: #2d2519 } .room { fill: #15181c }
    }
"""


# the drawing


@dataclass(eq=False)
class Box:
    """A room in the drawing, a file that lies directly in its package, or the place where an arrow passes a column.

    Attributes
    ----------
    label : str
        Its name within the package; "" for an arrow that passes.
    note : str
        How many files are in it; "" for a file.
    x, y : float
        Of its corner at the top left.
    """

    label: str = ""
    note: str = ""
    x: float = 0
    y: float = 0

    @property
    def width(self) -> float:
        """Of the box, by its longest line."""
        return max(len(self.label), len(self.note) - 1) * LETTER + 18 if self.label else 0

    @property
    def height(self) -> float:
        """Of the box: a file has no second line."""
        return ROOM_HEIGHT if self.note else FILE_HEIGHT if self.label else PASS_HEIGHT

    @property
    def middle(self) -> float:
        """Its vertical middle."""
        return self.y + self.height / 2


Column = list[Box]
Arrow = list[Box]  # from the box that imports, past columns, to the box that is imported


def inner_rooms(house: House, package: str) -> dict[str, set[str]]:
    """Return the rooms of a package and what each imports within it, without the package's ``__init__.py``."""
    graph = rooms(house)
    names = {file.room for file in house.values() if file.package == package and file.place.count("/")}
    names -= {f"{package}/__init__.py"}
    return {room: graph[room] & names for room in names}


def levels_of(graph: dict[str, set[str]]) -> dict[str, int]:
    """Return how many imports lie below each room, at most: it imports lower ones only, but for those of a circle."""
    ways, level = reachable(graph), dict.fromkeys(graph, 0)
    for _ in graph:
        for room, below in graph.items():
            level[room] = max([level[room], *(level[each] + 1 for each in below if room not in ways[each])])
    return level


def direct_imports(graph: dict[str, set[str]]) -> list[tuple[str, str]]:
    """Return the imports between rooms that do not follow from others: a → c is left out beside a → b → c."""
    ways = reachable(graph)
    return [
        (room, each)
        for room in sorted(graph)
        for each in sorted(graph[room])
        if not any(each in ways[other] for other in graph[room] - {each} if room not in ways[other])
    ]


def columns_of(house: House, package: str) -> tuple[list[Column], list[Arrow]]:
    """Return a package's boxes in columns, those that import others first, and the arrows between them."""
    graph, files = inner_rooms(house, package), by_folder(house)
    level, number = levels_of(graph), {room: len(files.get(room, ())) for room in graph}
    note = {0: "", 1: "1 file"}
    boxes = {room: Box(room.partition("/")[2], note.get(number[room], f"{number[room]} files")) for room in graph}
    columns: list[Column] = [[] for _ in range(max(level.values()) + 1)]
    for room in sorted(graph):
        columns[-1 - level[room]].append(boxes[room])
    arrows = []
    for one, other in direct_imports(graph):
        passes = [Box() for _ in range(level[other] + 1, level[one])]
        for step, box in enumerate(passes):
            columns[step - level[one]].append(box)
        arrows.append([boxes[one], *passes, boxes[other]])
    return columns, arrows


def lay_out(columns: list[Column], arrows: list[Arrow], top: float) -> float:
    """Place the boxes of a package below ``top``; return where the highest column ends."""
    height = max(_height(column) for column in columns)
    pairs = [pair for arrow in arrows for pair in pairwise(arrow)]
    there_and_back = [*columns, *reversed(columns), *columns]
    for column in there_and_back:
        column.sort(key=lambda box: _pull(box, pairs, top + height))
        y = top + (height - _height(column)) / 2
        for box in column:
            box.y, y = y, y + box.height + GAP
    _spread(columns)
    return top + height


def _height(column: Column) -> float:
    return sum(box.height + GAP for box in column) - GAP


def _pull(box: Box, pairs: list[tuple[Box, Box]], bottom: float) -> float:
    """Return the mean height of the boxes that a box has arrows with; the bottom, where it has none."""
    near = [b.middle for a, b in pairs if a is box] + [a.middle for a, b in pairs if b is box]
    return sum(near) / len(near) if near else bottom


def _spread(columns: list[Column]) -> None:
    """Place columns side by side, in the middle of the band."""
    widths = [max(box.width for box in column) for column in columns]
    space = WIDTH - LANES - 4 * MARGIN
    apart = min(70.0, (space - sum(widths)) / max(1, len(columns) - 1))
    x = 2 * MARGIN + (space - sum(widths) - apart * (len(columns) - 1)) / 2
    for column, width in zip(columns, widths, strict=True):
        for box in column:
            box.x = x + (width - box.width) / 2
        x += width + apart


def draw(house: House) -> str:
    """Return the drawing of packages, rooms and imports as SVG."""
    top, bands, inside = float(MARGIN), {}, []
    for package in reversed(PACKAGES):
        columns, arrows = columns_of(house, package)
        bottom = lay_out(columns, arrows, top + HEAD) + MARGIN
        bands[package] = (top, bottom)
        inside += [*map(_arrow, arrows), *(_box(box) for column in columns for box in column if box.label)]
        top = bottom + BAND_GAP
    height = top - BAND_GAP + MARGIN
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height:.0f}" '
        'font-family="Helvetica, Arial, sans-serif" font-size="13">',
        f"  <!-- SPDX-License-Identifier: Apache-2.0 -->\n  <style>{STYLE}  </style>",
        '  <defs><marker id="tip" viewBox="0 0 10 10" refX="9" refY="5" markerWidth="7" markerHeight="7" orient="auto">'
        '<path class="tip" d="M0 0L10 5L0 10z"/></marker></defs>',
        f'  <rect class="ground" width="{WIDTH}" height="{height:.0f}"/>',
        *(_band(package, *bands[package]) for package in reversed(PACKAGES)),
        *_package_arrows(house, bands),
        *inside,
        "</svg>",
    ]
    return "\n".join(lines) + "\n"


def _band(package: str, top: float, bottom: float) -> str:
    width = WIDTH - LANES - 2 * MARGIN
    return (
        f'  <rect class="{package}" x="{MARGIN}" y="{top:.0f}" width="{width}" height="{bottom - top:.0f}" rx="10"/>\n'
        f'  <text class="name" x="{2 * MARGIN}" y="{top + 22:.0f}">{NAMESPACE}.{package}</text>'
    )


def _box(box: Box) -> str:
    center, corner = box.x + box.width / 2, 6 if box.note else 2
    lines = [
        f'  <rect class="room" x="{box.x:.0f}" y="{box.y:.0f}" width="{box.width:.0f}" height="{box.height}" '
        f'rx="{corner}"/>',
        f'  <text text-anchor="middle" x="{center:.0f}" y="{box.y + 18:.0f}">{box.label}</text>',
    ]
    if box.note:
        y = box.y + 34
        lines.append(f'  <text class="small" text-anchor="middle" x="{center:.0f}" y="{y:.0f}">{box.note}</text>')
    return "\n".join(lines)


def _arrow(arrow: Arrow) -> str:
    """Return an arrow as a curve from the right edge of a box, past columns, to the left edge of another."""
    x, y = arrow[0].x + arrow[0].width, arrow[0].middle
    path = f"M{x:.0f} {y:.0f}"
    for box in arrow[1:]:
        bend = (box.x - x) / 2
        path += f"C{x + bend:.0f} {y:.0f} {box.x - bend:.0f} {box.middle:.0f} {box.x:.0f} {box.middle:.0f}"
        x, y = box.x, box.middle
    return f'  <path class="arrow" stroke-width="1.3" marker-end="url(#tip)" d="{path}"/>'


def _package_arrows(house: House, bands: dict[str, tuple[float, float]]) -> list[str]:
    """Return the arrows between packages, at the right: the further they go, the further out they run."""
    found = {(file.package, each.module.split(".")[1]) for file in house.values() for each in file.imports}
    order = {package: number for number, package in enumerate(reversed(PACKAGES))}
    pairs = sorted((abs(order[b] - order[a]), order[a], a, b) for a, b in found if a != b)
    right, lines, lanes = WIDTH - LANES - MARGIN, [], 0
    for distance, _, above, below in pairs:
        lane, lanes = (0, 1) if distance == 1 else (lanes, lanes + 1)  # neighbours share a lane
        y, to_y = bands[above][1] - 14 - 10 * lane, bands[below][0] + 14 + 10 * lane
        path = f"M{right} {y:.0f}h{16 + LANE * lane}V{to_y:.0f}H{right + 2}"
        lines.append(f'  <path class="arrow" stroke-width="1.8" marker-end="url(#tip)" d="{path}"/>')
    return lines


# the list


def listing(house: House) -> str:
    """Return packages, rooms and files with the first lines of their docstrings; each imports only what is below it."""
    return "\n".join(line for package in reversed(PACKAGES) for line in _package_lines(house, package))


def _package_lines(house: House, package: str) -> list[str]:
    folder = f"sub-packages/{NAMESPACE}-{package}/src/{NAMESPACE}/{package}/"
    graph, files, level = rooms(house), by_folder(house), levels_of(inner_rooms(house, package))
    lines = ["", f"### {NAMESPACE}.{package}", "", f"{_first_line(house, package)} In `{folder}`."]
    lines += ["", "| file | what it holds |", "|---|---|"]
    for name in sorted(files, key=lambda name: (-level.get(name, len(level)), name)):
        if name.split("/")[0] != package:
            continue
        if name != package:
            lines.append(f"| **`{name}/`** | **{_first_line(house, name)}** {_imports(graph[name])} |")
        lines += [f"| `{_relative(file.place, package)}` | {_cell(file.docstring)} |" for file in files[name]]
    return lines


def _first_line(house: House, folder: str) -> str:
    return _cell(house[".".join([NAMESPACE, *folder.split("/")])].docstring)


def _cell(docstring: str) -> str:
    """Return the first line of a docstring, fit for a table."""
    return (docstring.splitlines() or [""])[0].replace("|", "\\|").replace("<", "&lt;")


def _imports(below: set[str]) -> str:
    """Return a sentence with the rooms that a room imports, package by package."""
    parts = []
    for other in reversed(PACKAGES):
        names = sorted(room.partition("/")[2] for room in below if room.startswith(f"{other}/"))
        names = [name for name in names if name != "__init__.py" and not (other == "core" and name.endswith(".py"))]
        if any(room.startswith(f"{other}/") for room in below):
            parts.append(f"{other} ({', '.join(names)})" if names else other)
    return f"Imports {', '.join(parts) or 'nothing of Megacell'}."


def _relative(place: str, package: str) -> str:
    return place.removeprefix(f"{package}/") if place.startswith(f"{package}/") else f"{NAMESPACE}/{place}"


# both


def made(house: House) -> dict[Path, str]:
    """Return the files that this script writes, and their contents."""
    before, _, rest = PAGE.read_text().partition(BEGIN)
    after = rest.partition(END)[2]
    return {PICTURE: draw(house), PAGE: f"{before}{BEGIN}\n{listing(house)}\n\n{END}{after}"}


def stale(house: House) -> list[str]:
    """Return the names of the files that would change."""
    return [path.name for path, text in made(house).items() if not path.is_file() or path.read_text() != text]


if __name__ == "__main__":
    for path, text in made(read_house()).items():
        path.write_text(text)
