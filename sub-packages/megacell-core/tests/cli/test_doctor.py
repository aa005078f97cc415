# SPDX-License-Identifier: Apache-2.0
"""`megacell doctor`, the part that needs no torch, on machines that are made up."""

import json
import os
import resource
import shutil
import sys
from importlib.metadata import EntryPoint, PackageNotFoundError
from types import SimpleNamespace

import pytest

from megacell.core import findings, machine, versions
from megacell.core.cli import doctor
from megacell.core.cli.main import main
from megacell.core.findings import OK, WRONG, Finding


@pytest.fixture
def root(tmp_path):
    """A function that writes files of /proc and /sys below a folder and returns it."""

    def write(**files: str):
        for name, text in files.items():
            path = tmp_path / name.replace("__", "/")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        return tmp_path

    return write


@pytest.fixture
def installed(monkeypatch):
    """A function that makes up which packages are installed, and what ours need."""

    def make_up(needs: dict[str, list[str]], **installed: str):
        def version(name: str) -> str:
            if name.replace("-", "_") not in installed:
                raise PackageNotFoundError(name)
            return installed[name.replace("-", "_")]

        monkeypatch.setattr(versions, "version", version)
        monkeypatch.setattr(versions, "requires", needs.__getitem__)

    return make_up


def test_a_version_out_of_bounds_is_wrong_and_its_fix_is_a_command(installed):
    needs = ["numpy<3,>=2.0", "scipy>=1.13", "h5py>=3", "pytest>=8; extra == 'test'"]
    installed({"ours": needs}, ours="1", numpy="1.26.4", scipy="1.17.1")
    found = versions.package_versions(["ours", "not-here"], ["scipy", "zarr"], ["flash-attn"])
    assert found == [
        Finding("versions", "scipy", "1.17.1"),
        Finding("versions", "numpy", "1.26.4, Megacell needs <3,>=2.0", "wrong", "pip install 'numpy<3,>=2.0'"),
        Finding("versions", "h5py", "not installed, Megacell needs >=3", "wrong", "pip install 'h5py>=3'"),
        Finding("versions", "flash-attn", "not installed (optional)"),
    ]
    assert not findings.will_work(found)


def test_a_package_is_within_the_bounds_of_all_of_ours(installed):
    installed({"one": ["numpy<3"], "other": ["numpy>=2"]}, one="1", other="1", numpy="1.26.4")
    (found,) = versions.package_versions(["one", "other"], [])
    assert (found.state, found.value) == (WRONG, "1.26.4, Megacell needs <3,>=2")
    installed({"one": ["zarr"]}, one="1")
    assert versions.package_versions(["one"], [])[0].value == "not installed, Megacell needs it"


def test_a_pre_release_within_the_bounds_is_well(installed):
    installed({"ours": ["torch<2.14,>=2.10"]}, ours="1", torch="2.11.0a0+a6c236b9fd.nv26.03")
    assert findings.will_work(versions.package_versions(["ours"], ["torch"]))
    installed({"ours": ["torch<2.14,>=2.10"]}, ours="1", torch="2.10.0a0+b4e4ee81d3.nv25.12")
    assert not findings.will_work(versions.package_versions(["ours"], ["torch"]))


@pytest.mark.parametrize(
    ("here", "expected", "version"),
    [
        ({"megacell": "2.0"}, ["megacell"], "2.0"),
        ({"megacell_core": "2.0", "megacell_store": "2.0"}, ["megacell-core", "megacell-store"], "2.0"),
        ({}, [], "unknown"),
    ],
    ids=["the whole", "sub-packages", "none"],
)
def test_our_distributions_are_known_by_their_entry_points(here, expected, version, installed, monkeypatch):
    points = [EntryPoint("store", "a:b", versions.COMMANDS), EntryPoint("unknown", "a:b", versions.COMMANDS)]
    vars(points[0])["dist"] = SimpleNamespace(name="megacell-store")
    monkeypatch.setattr(versions, "entry_points", lambda group: [each for each in points if each.group == group])
    installed({}, **here)
    assert versions.own_distributions() == expected
    assert versions.installed_version() == version


@pytest.mark.parametrize(("version", "state"), [((3, 11, 7), "ok"), ((3, 10, 1), "wrong"), ((3, 14, 0), "wrong")])
def test_python_has_to_be_one_that_megacell_takes(version, state, monkeypatch):
    monkeypatch.setattr(sys, "version_info", version)
    assert versions.python_version().state == state


@pytest.mark.parametrize(
    ("limit", "value"),
    [("400000 100000", "8"), ("150000 100000", "8, limited to 1.5 by the container"), ("max 100000", "8")],
)
def test_cores_are_those_of_the_container(limit, value, root, monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    value = value if limit != "400000 100000" else "8, limited to 4.0 by the container"
    assert machine.cores(root(sys__fs__cgroup__cpu_max=limit)).value == "8"  # no such file: no limit
    (root() / "sys/fs/cgroup/cpu.max").write_text(limit)
    assert machine.cores(root()).value == value


def meminfo(total: float, free: float) -> str:
    return f"MemTotal:       {total * 2**20:.0f} kB\nMemFree: 1 kB\nMemAvailable:   {free * 2**20:.0f} kB\n"


def test_memory_is_what_the_container_leaves(root):
    here = root(proc__meminfo=meminfo(64, 60))
    assert machine.memory(here) == Finding("machine", "memory", "64.0 GiB, 60.0 free")
    (here / "sys/fs/cgroup").mkdir(parents=True)
    (here / "sys/fs/cgroup/memory.max").write_text(str(8 * 2**30))
    (here / "sys/fs/cgroup/memory.current").write_text(str(2 * 2**30))
    assert machine.memory(here).value == "8.0 GiB (the container's limit), 6.0 free"
    (here / "sys/fs/cgroup/memory.current").write_text(str(6 * 2**30))
    assert machine.memory(here).state == "warning"
    (here / "sys/fs/cgroup/memory.max").write_text("max")
    assert machine.memory(here).value == "64.0 GiB, 60.0 free"


@pytest.mark.parametrize(("free", "state"), [(8 * 2**30, "ok"), (60 * 2**20, "warning")])
def test_dockers_small_shared_memory_is_found(free, state, monkeypatch, tmp_path):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(total=free, free=free))
    found = machine.shared_memory(tmp_path)
    assert (found.state, "--ipc host" in found.fix) == (state, state == "warning")


def test_no_shared_memory_at_all_is_found(tmp_path):
    assert machine.shared_memory(tmp_path / "none").value == "not there"


@pytest.mark.parametrize(("limits", "state"), [((256, 4096), "warning"), ((1024, 4096), "ok"), ((-1, -1), "ok")])
def test_few_open_files_are_found_with_the_command_that_fixes_it(limits, state, monkeypatch):
    monkeypatch.setattr(resource, "getrlimit", lambda which: limits)
    found = machine.open_files()
    assert found.state == state
    assert ("ulimit -n 4096" in found.fix) == (state == "warning")


MOUNTS = """\
22 1 254:0 / / rw,relatime shared:1 - ext4 /dev/vda rw
30 22 0:40 / {work} rw,relatime shared:9 - {kind} server:/export rw
31 22 0:41 / {work}\\040copy rw - xfs /dev/vdb rw
"""


@pytest.mark.parametrize(
    ("kind", "state"), [("nfs4", "warning"), ("lustre", "warning"), ("fuse.sshfs", "warning"), ("tmpfs", "warning"),
                        ("xfs", "ok"), ("ext4", "ok")],
)  # fmt: skip
def test_a_file_system_is_named_and_a_slow_or_passing_one_found(kind, state, root, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(total=2**40, free=2**39))
    (tmp_path / "work" / "runs").mkdir(parents=True)
    here = root(proc__self__mountinfo=MOUNTS.format(work=tmp_path / "work", kind=kind))
    found = machine.disk(tmp_path / "work" / "runs", measure=False, root=here)
    assert (found[0].value, found[0].state) == (kind, state)
    assert [finding.name for finding in found] == ["file system", "free"]
    (tmp_path / "work copy").mkdir()
    assert machine.file_system(tmp_path / "work copy", here) == "xfs"
    assert machine.file_system(tmp_path, here) == "ext4"


def test_a_disk_is_measured_and_left_clean(tmp_path):
    before = machine.measure_disk(tmp_path, 8 * 2**20)
    assert before.write > 0
    assert before.read > 0
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("read", "state"), [(50e6, "warning"), (500e6, "ok")])
def test_a_slow_disk_is_found(read, state, monkeypatch, tmp_path):
    monkeypatch.setattr(machine, "measure_disk", lambda path: machine.Speed(write=200e6, read=read, cold=True))
    writing, reading = machine.disk(tmp_path, measure=True)[2:]
    assert writing.value == "200 MB/s"
    assert (reading.value, reading.state) == (f"{read / 1e6:.0f} MB/s", state)


def test_a_full_or_broken_disk_is_wrong(monkeypatch, tmp_path):
    def broken(path):
        raise OSError("Input/output error")

    monkeypatch.setattr(machine, "measure_disk", broken)
    assert "Input/output error" in machine.disk(tmp_path, measure=True)[-1].value
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(total=2**40, free=2**20))
    found = machine.disk(tmp_path, measure=True)
    assert [finding.state for finding in found[1:]] == ["warning", "wrong"]


def test_a_path_that_cannot_be_written_may_hold_a_store(monkeypatch, tmp_path):
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    last = machine.disk(tmp_path, measure=True)[-1]
    assert (last.name, last.value, last.state) == ("writable", "no", "warning")


@pytest.fixture
def run_doctor(capsys):
    """A function that runs `megacell doctor --quick` and returns exit code, output and errors."""

    def run(*words: object):
        code = main(["doctor", "--quick", *map(str, words)])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


def test_the_exit_code_says_whether_all_will_work(run_doctor, monkeypatch, tmp_path):
    code, out, _ = run_doctor("--json", "--path", tmp_path)
    answer = json.loads(out)
    assert (code, answer["will_work"]) == (0, True)
    assert {"topic", "name", "value", "state", "fix"} == set(answer["findings"][0])
    monkeypatch.setattr(machine, "open_files", lambda: Finding("machine", "open files", "3", "wrong", "raise it"))
    code, out, _ = run_doctor("--json", "--path", tmp_path)
    assert (code, json.loads(out)["will_work"]) == (1, False)
    code, out, _ = run_doctor("--path", tmp_path)
    lines = [line.strip() for line in out.splitlines()]
    assert code == 1
    assert any(line.startswith("x open files") for line in lines)
    assert "raise it" in lines
    assert "\x1b" not in out, "no colours where there is no terminal"


def test_a_path_that_is_not_there_is_refused(run_doctor, tmp_path):
    code, out, err = run_doctor("--path", tmp_path / "none")
    assert (code, out) == (2, "")
    assert "no such folder" in err


def test_packages_bring_checks_that_are_loaded_when_doctor_runs(run_doctor, monkeypatch, tmp_path):
    asked = []

    def check(quick):
        asked.append(quick)
        return [Finding("made up", "name", "value", WRONG, "fix it"), versions.python_version()]

    point = SimpleNamespace(name="made-up", load=lambda: check)
    monkeypatch.setattr(doctor, "entry_points", lambda group: [point] if group == versions.CHECKS else [])
    code, out, _ = run_doctor("--json", "--path", tmp_path)
    names = [finding["name"] for finding in json.loads(out)["findings"]]
    assert (code, asked) == (1, [True])
    assert names[-1] == "name"
    assert names.count("python") == 1, "what two packages find is printed once"
    monkeypatch.setattr(doctor, "entry_points", lambda group: [])
    code, out, _ = run_doctor("--json", "--path", tmp_path)
    assert (code, {finding["state"] for finding in json.loads(out)["findings"]} <= {OK, "warning"}) == (0, True)
