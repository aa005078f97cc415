# SPDX-License-Identifier: Apache-2.0
"""Which file imports which, read from the sources, and every import that breaks a rule of the house.

The house is the folder ``sub-packages``: packages, in them rooms (folders), in them files. Its rules:

- an import goes down the list `PACKAGES` or stays in its package;
- neither files nor rooms import each other in a circle;
- a room holds at most `MOST_FILES` files;
- a name with a leading underscore stays in its file;
- the ``__init__.py`` of a room imports nothing of Megacell, since it runs whenever a file of the room is imported;
- what is imported exists, and lies in a package of the list.

An import counts wherever it stands: at the top of a file, within a function, or under ``TYPE_CHECKING``. A file that
lies directly in its package (``training/engine.py``, ``store/__init__.py``) is a room of its own where circles are
looked for, since rooms import it and it imports rooms; where files are counted, it is counted with the others of its
package. That importing a file runs the ``__init__.py`` of the folders above it is not counted as an import.
"""

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("core", "store", "training", "geneformer")  # each may import those before it
MOST_FILES = 15
NAMESPACE = "megacell"


@dataclass(frozen=True)
class Import:
    """One import of a file of the house.

    Attributes
    ----------
    line : int
    module : str
        The file that is imported, as a module; what the source says, where no such file exists.
    name : str
        What is taken out of it; "" for the module itself.
    """

    line: int
    module: str
    name: str = ""


@dataclass(frozen=True)
class File:
    """A file of the house.

    Attributes
    ----------
    module : str
        As it is imported: ``megacell.store.read.gather``.
    place : str
        Its path within the namespace: ``store/read/gather.py``.
    package : str
        The name of its sub-package, without ``megacell-``.
    docstring : str
    imports : tuple of Import
    """

    module: str
    place: str
    package: str
    docstring: str
    imports: tuple[Import, ...]

    @property
    def folder(self) -> str:
        """The folder that it lies in: ``store/read``, or its package: ``store``."""
        return self.place.rpartition("/")[0] or self.package

    @property
    def room(self) -> str:
        """Its folder, or its own place if it lies directly in its package."""
        return self.folder if "/" in self.folder else self.place


House = dict[str, File]  # by module


def read_house(root: Path = ROOT) -> House:
    """Return all files below ``root/sub-packages/*/src/megacell``, by their modules."""
    paths = {_module(path): path for path in sorted(root.glob(f"sub-packages/*/src/{NAMESPACE}/**/*.py"))}
    return {module: _read(module, path, paths) for module, path in paths.items()}


def _module(path: Path) -> str:
    parts = path.with_suffix("").parts
    start = len(parts) - 1 - parts[::-1].index(NAMESPACE)
    return ".".join(part for part in parts[start:] if part != "__init__")


def _read(module: str, path: Path, known: dict[str, Path]) -> File:
    tree = ast.parse(path.read_text(), path)
    source = next(folder for folder in path.parents if folder.name == "src")
    place = path.relative_to(source / NAMESPACE).as_posix()
    package = source.parent.name.removeprefix(f"{NAMESPACE}-")
    inside = module if path.name == "__init__.py" else module.rpartition(".")[0]
    imports = tuple(sorted(set(_imports(tree, inside, known)), key=lambda each: (each.line, each.module, each.name)))
    return File(module, place, package, ast.get_docstring(tree) or "", imports)


def _imports(tree: ast.Module, inside: str, known: dict[str, Path]) -> Iterator[Import]:
    """Yield what a file imports of the house; ``inside`` is the package that relative imports start from."""
    modules: dict[str, str] = {}  # name in this file → the module that it stands for
    for node in ast.walk(tree):
        for line, full, name, alias in _statements(node, inside):
            if name and f"{full}.{name}" in known:
                full, name = f"{full}.{name}", ""
            if not name and alias:
                modules[alias] = full
            if full.startswith(f"{NAMESPACE}."):
                yield Import(line, full, name)
    for node in ast.walk(tree):  # gather._copy, where gather is a module
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and _is_private(node.attr):
            full = modules.get(node.value.id, "")
            if full in known:
                yield Import(node.lineno, full, node.attr)


def _statements(node: ast.AST, inside: str) -> Iterator[tuple[int, str, str, str]]:
    """Yield (line, module, name, what it is called here) of an import statement, or of a call of import_module."""
    if isinstance(node, ast.Import):
        for each in node.names:
            yield node.lineno, each.name, "", each.asname or each.name
    elif isinstance(node, ast.ImportFrom):
        above = inside.split(".")[: len(inside.split(".")) - node.level + 1] if node.level else []
        full = ".".join([*above, *([node.module] if node.module else [])])
        for each in node.names:
            yield node.lineno, full, each.name, each.asname or each.name
    elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
        yield from ((node.lineno, str(each.value), "", "") for each in node.args[:1] if isinstance(each, ast.Constant))


def _is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


# the rules: each function returns a line for every breach


def upward(house: House) -> list[str]:
    """Return the imports of a package by one below it."""
    found = {
        f"{file.place}:{each.line}: {file.package} imports {each.module}, of a package above it": None
        for file, each in _all_imports(house)
        if {file.package, _package(each)} <= set(PACKAGES)
        and PACKAGES.index(_package(each)) > PACKAGES.index(file.package)
    }
    return list(found)


def unknown(house: House) -> list[str]:
    """Return the packages that `PACKAGES` does not list, and the imports of files that do not exist."""
    packages = sorted({file.package for file in house.values()} - set(PACKAGES))
    missing = [(file, each) for file, each in _all_imports(house) if each.module not in house]
    return [f"megacell-{name}: not in the list of packages" for name in packages] + [
        f"{file.place}:{each.line}: no file for {each.module}" for file, each in missing
    ]


def circles_of_files(house: House) -> list[str]:
    """Return the groups of files that import each other in a circle."""
    return _circles(house, "place")


def circles_of_rooms(house: House) -> list[str]:
    """Return the groups of rooms that import each other in a circle."""
    return _circles(house, "room")


def crowded_rooms(house: House) -> list[str]:
    """Return the rooms of more than `MOST_FILES` files, ``__init__.py`` not counted."""
    found = {folder: len(files) for folder, files in by_folder(house).items() if len(files) > MOST_FILES}
    return [f"{folder}/: {number} files, more than {MOST_FILES}" for folder, number in found.items()]


def private_names(house: House) -> list[str]:
    """Return the uses of names with a leading underscore outside the file that they stand in."""
    return [
        f"{file.place}:{each.line}: {each.module}.{each.name} is private to its file"
        for file, each in _all_imports(house)
        if _is_private(each.name) or _is_private(each.module.rpartition(".")[2])
    ]


def busy_rooms(house: House) -> list[str]:
    """Return the imports of Megacell in an ``__init__.py`` of a room; that of a package may give public names."""
    found = [(file, each) for file, each in _all_imports(house) if file.place.endswith("/__init__.py")]
    return [f"{file.place}:{each.line}: imports {each.module}" for file, each in found if file.folder != file.package]


RULES = (upward, unknown, circles_of_files, circles_of_rooms, crowded_rooms, private_names, busy_rooms)


# what the rules and the drawing are made from


def by_folder(house: House) -> dict[str, list[File]]:
    """Return the files of each folder, ``__init__.py`` left out."""
    folders: dict[str, list[File]] = {}
    for file in house.values():
        if not file.place.endswith("__init__.py"):
            folders.setdefault(file.folder, []).append(file)
    return folders


def rooms(house: House) -> dict[str, set[str]]:
    """Return the rooms that each room imports, itself left out."""
    graph: dict[str, set[str]] = {file.room: set() for file in house.values()}
    for file, each in _all_imports(house):
        if each.module in house:
            graph[file.room].add(house[each.module].room)
    return {room: below - {room} for room, below in graph.items()}


def reachable(graph: dict[str, set[str]]) -> dict[str, set[str]]:
    """Return what can be reached from each node of a graph by one step or more."""
    found = {}
    for start, first in graph.items():
        seen, ahead = set(first), list(first)
        while ahead:
            new = graph[ahead.pop()] - seen
            seen |= new
            ahead += new
        found[start] = seen
    return found


def _package(each: Import) -> str:
    return each.module.split(".")[1]


def _all_imports(house: House) -> Iterator[tuple[File, Import]]:
    return ((file, each) for file in house.values() for each in file.imports)


def _circles(house: House, unit: str) -> list[str]:
    """Return a text for each group of units in a circle, with one import for each of its arrows."""
    arrows: dict[tuple[str, str], str] = {}
    for file, each in _all_imports(house):
        if each.module in house:
            pair = getattr(file, unit), getattr(house[each.module], unit)
            arrows.setdefault(pair, f"{file.place}:{each.line}")
    graph: dict[str, set[str]] = {getattr(file, unit): set() for file in house.values()}
    for above, below in arrows:
        graph[above] |= {below} - {above}
    ways = reachable(graph)
    groups = {frozenset(b for b in ways[a] if a in ways[b]) for a in graph if a in ways[a]}
    return [
        f"a circle of {len(group)}:"
        + "".join(f"\n  {a} → {b} ({arrows[a, b]})" for a in sorted(group) for b in sorted(graph[a] & group))
        for group in sorted(groups, key=sorted)
    ]
