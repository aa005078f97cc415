# SPDX-License-Identifier: Apache-2.0
"""Files that somebody made to harm who opens them, from good ones of version 0.1.0, and a process that opens them."""

import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash
import yaml

HERE = Path(__file__).resolve().parent
WRITTEN = HERE.parent / "written_by_0_1_0"
MODEL, STORE, RUN = WRITTEN / "model.nemo", WRITTEN / "store", WRITTEN / "run"
CONFIG, WEIGHTS, GENES = "./model_config.yaml", "./model_weights.ckpt", "./vocabulary/genes.parquet"
SECRET = "hunter2"  # in the environment of those that open files
WAIT = 300.0  # seconds for all files of a test


@dataclass(frozen=True)
class Opened:
    """What came of opening one file.

    Attributes
    ----------
    kind : str
        "refused" for an error of ours, "opened", else the name of another error.
    text : str
        The error, or what was found.
    seconds, megabytes : float
        Of the process; by how much its peak memory rose.
    """

    kind: str
    text: str
    seconds: float
    megabytes: float

    def assert_refused(self, words: str = "", *, seconds: float = 30.0, megabytes: float = 400.0) -> None:
        """Assert that it was refused in one line with some words, soon and in little memory, and told no secret."""
        assert self.kind == "refused", f"{self.kind}: {self.text}"
        assert words in self.text, self.text
        assert "\n" not in self.text
        assert len(self.text) < 1200, self.text
        assert SECRET not in self.text
        assert self.seconds < seconds
        assert self.megabytes < megabytes


def open_all(cases: Iterable[tuple[str, str, list[Any]]], folder: Path) -> dict[str, Opened]:
    """Open files in one process of their own: it may be ended by one of them.

    Parameters
    ----------
    cases : iterable of (name, function, arguments)
        Functions of `models_child`.
    folder : Path
        For the list of cases.
    """
    given = folder / "cases.json"
    given.write_text(json.dumps([list(case) for case in cases], default=str))
    paths = os.pathsep.join([str(HERE), str(HERE.parent), *(path for path in sys.path if path)])
    environment = {**os.environ, "PYTHONPATH": paths, "SECRET_TOKEN": SECRET, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, HERE / "models_child.py", given]
    try:
        printed = subprocess.run(command, env=environment, text=True, capture_output=True, timeout=WAIT).stdout
    except subprocess.TimeoutExpired as error:
        printed = (error.stdout or b"").decode()
    lines = [json.loads(line) for line in printed.splitlines() if line.startswith('["')]
    died = Opened("died", "the process ended, or was ended, at this file or before", 0.0, 0.0)
    found = {name: died for name, *_ in json.loads(given.read_text())}
    return found | {name: Opened(*rest) for name, *rest in lines}


# -- .nemo files


def members(path: Path = MODEL) -> dict[str, bytes]:
    """Return the files in an archive by name."""
    with tarfile.open(path) as tar:
        return {m.name: tar.extractfile(m).read() for m in tar.getmembers() if m.isfile()}  # type: ignore[union-attr]


def write_nemo(path: Path, parts: dict[str, bytes]) -> Path:
    """Write an archive of files."""
    with tarfile.open(path, "w:") as tar:
        for name, content in parts.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def with_config(change: Callable[[dict[str, Any]], Any]) -> dict[str, bytes]:
    """Return the files of an archive whose configuration was changed."""
    parts = members()
    config = yaml.safe_load(parts[CONFIG])
    change(config)
    return {**parts, CONFIG: yaml.safe_dump(config).encode()}


# -- runs


def copy_run(folder: Path) -> Path:
    """Copy the run, its store's and vocabulary's paths made right."""
    run = folder / "run"
    shutil.copytree(RUN, run)
    config = yaml.safe_load((run / "config.yaml").read_text())
    config |= {"store": str(STORE), "vocabulary": str(run / "vocabulary")}
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    return run


def change_config(run: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change a run's options in its folder."""
    config = yaml.safe_load((run / "config.yaml").read_text())
    change(config)
    (run / "config.yaml").write_text(yaml.safe_dump(config))


def checkpoint_of(run: Path) -> Path:
    """Return a run's one checkpoint."""
    (found,) = (run / "checkpoints").iterdir()
    return found


def change_facts(run: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change what a run's checkpoint says of itself."""
    marker = checkpoint_of(run) / "checkpoint.json"
    facts = json.loads(marker.read_text())
    change(facts)
    marker.write_text(json.dumps(facts))


def replace_file(run: Path, name: str, content: bytes) -> None:
    """Replace a file of a run's checkpoint by another with the right size and hash."""
    (checkpoint_of(run) / name).write_bytes(content)
    record = [len(content), xxhash.xxh3_64_hexdigest(content)]
    change_facts(run, lambda facts: facts["files"].update({name: record}))
