# SPDX-License-Identifier: Apache-2.0
"""Imports go down the list of packages and make no circle; the drawing and the list of rooms are up to date."""

import importlib.util
import tomllib
from pathlib import Path

import doors
import pytest


def drawing():
    """Return docs/draw_rooms.py as a module."""
    spec = importlib.util.spec_from_file_location("draw_rooms", doors.ROOT / "docs" / "draw_rooms.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def house() -> doors.House:
    """The files of this repository."""
    return doors.read_house()


@pytest.mark.parametrize("rule", doors.RULES, ids=lambda rule: rule.__name__)
def test_nothing_breaks_a_rule_of_the_house(rule, house):
    assert len(house) > 150
    assert not rule(house), "\n".join(rule(house))


def test_every_package_needs_the_packages_that_it_imports(house):
    needed, imported = {}, {name: set() for name in doors.PACKAGES}
    for name in doors.PACKAGES:
        text = (doors.ROOT / f"sub-packages/megacell-{name}/pyproject.toml").read_text()
        needs = tomllib.loads(text)["project"]["dependencies"]
        needed[name] = {need.removeprefix("megacell-") for need in needs if need.startswith("megacell-")}
    for file in house.values():
        imported[file.package] |= {each.module.split(".")[1] for each in file.imports} - {file.package}
    assert needed == imported


def test_every_entry_point_names_a_file(house):
    values = []
    for name in doors.PACKAGES:
        text = (doors.ROOT / f"sub-packages/megacell-{name}/pyproject.toml").read_text()
        groups = tomllib.loads(text)["project"].get("entry-points", {}).values()
        values += [(name, value.split(":")[0]) for group in groups for value in group.values()]
    assert len(values) > 5
    assert not [(name, module) for name, module in values if module not in house or house[module].package != name]


def test_the_drawing_and_the_list_of_rooms_are_up_to_date(house):
    stale = drawing().stale(house)
    assert not stale, f"{stale}: run `make rooms`"


# the check can fail: each kind of breach, in a small tree

SOUND = {
    "core/__init__.py": "",
    "core/errors.py": "class DataError(Exception): ...",
    "core/files.py": "from megacell.core.errors import DataError",
    "core/cli/__init__.py": "",
    "core/cli/main.py": "import importlib\nfrom megacell.core import files\nfiles.write",
    "store/__init__.py": "from megacell.store.read.cells import CellStore",
    "store/read/__init__.py": "",
    "store/read/cells.py": "import megacell.core.files as whole\nfrom ..format.shard import Shard\nwhole.__doc__",
    "store/format/__init__.py": "",
    "store/format/shard.py": "from numpy import _core\n_own = 1",
}
UP = "core/errors.py:{}: core imports megacell.store.read.cells, of a package above it"


def plant(root: Path, files: dict[str, str]) -> doors.House:
    """Write a tree of packages, by the paths of files within the namespace, and read it."""
    for place, text in files.items():
        path = root / f"sub-packages/megacell-{place.split('/')[0]}/src/megacell" / place
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{text}\n")
    return doors.read_house(root)


def test_a_sound_tree_breaks_no_rule(tmp_path):
    house = plant(tmp_path, SOUND)
    assert len(house) == len(SOUND)
    assert not [breach for rule in doors.RULES for breach in rule(house)]
    assert doors.rooms(house)["store/read"] == {"core/files.py", "store/format"}


@pytest.mark.parametrize(
    ("text", "line"),
    [
        pytest.param("from megacell.store.read.cells import CellStore", 1, id="from a file"),
        pytest.param("from megacell.store.read import cells", 1, id="a file from its room"),
        pytest.param("import megacell.store.read.cells as cells", 1, id="a module"),
        pytest.param("def late():\n    from megacell.store.read.cells import CellStore", 2, id="within a function"),
        pytest.param("if TYPE_CHECKING:\n    from megacell.store.read.cells import X", 2, id="for types only"),
        pytest.param("import importlib\nimportlib.import_module('megacell.store.read.cells')", 2, id="by its name"),
    ],
)
def test_an_import_upward_is_found(text, line, tmp_path):
    house = plant(tmp_path, SOUND | {"core/errors.py": text})
    assert doors.upward(house) == [UP.format(line)]


def test_a_circle_of_files_is_found(tmp_path):
    house = plant(tmp_path, SOUND | {"core/errors.py": "def late():\n    from .files import write"})
    (circle,) = doors.circles_of_files(house)
    assert circle.splitlines() == [
        "a circle of 2:",
        "  core/errors.py → core/files.py (core/errors.py:2)",
        "  core/files.py → core/errors.py (core/files.py:1)",
    ]
    assert len(doors.circles_of_rooms(house)) == 1  # files beside the rooms are rooms of their own


def test_a_circle_of_rooms_is_found_though_no_files_make_one(tmp_path):
    house = plant(tmp_path, SOUND | {"store/format/verify.py": "from megacell.store.read import query",
                                     "store/read/query.py": ""})  # fmt: skip
    assert not doors.circles_of_files(house)
    (circle,) = doors.circles_of_rooms(house)
    assert "  store/format → store/read (store/format/verify.py:1)\n" in circle
    assert "  store/read → store/format (store/read/cells.py:2)" in circle


def test_a_file_that_takes_a_name_from_its_own_package_makes_a_circle(tmp_path):
    house = plant(tmp_path, SOUND | {"store/format/shard.py": "from megacell.store import CellStore"})
    (circle,) = doors.circles_of_files(house)
    assert circle.startswith("a circle of 3:")


@pytest.mark.parametrize("folder", ["store/format", "core"])
def test_a_crowded_room_is_found(folder, tmp_path):
    there = sum(place.rpartition("/")[0] == folder and not place.endswith("__init__.py") for place in SOUND)
    more = {f"{folder}/file_{number}.py": "" for number in range(doors.MOST_FILES - there)}
    assert not doors.crowded_rooms(plant(tmp_path, SOUND | more))
    house = plant(tmp_path, {f"{folder}/one_more.py": ""})
    assert doors.crowded_rooms(house) == [f"{folder}/: 16 files, more than 15"]


@pytest.mark.parametrize(
    "text",
    [
        pytest.param("from megacell.store.format.shard import _own", id="imported"),
        pytest.param("from megacell.store.format import shard\nshard._own", id="of an imported module"),
        pytest.param("from ..format import shard as s\ndef f():\n    return s._own", id="of one under another name"),
    ],
)
def test_a_private_name_of_another_file_is_found(text, tmp_path):
    (breach,) = doors.private_names(plant(tmp_path, SOUND | {"store/read/cells.py": text}))
    assert breach.startswith("store/read/cells.py:")
    assert breach.endswith("megacell.store.format.shard._own is private to its file")


def test_a_room_that_imports_when_it_is_imported_is_found(tmp_path):
    house = plant(tmp_path, SOUND | {"store/read/__init__.py": "from .cells import CellStore"})
    assert doors.busy_rooms(house) == ["store/read/__init__.py:1: imports megacell.store.read.cells"]


def test_what_does_not_exist_is_found(tmp_path):
    house = plant(tmp_path, SOUND | {"core/files.py": "from megacell.core.durable import write", "tasks/a.py": ""})
    assert doors.unknown(house) == [
        "megacell-tasks: not in the list of packages",
        "core/files.py:1: no file for megacell.core.durable",
    ]
