# SPDX-License-Identifier: Apache-2.0
"""`megacell` as a user runs it, in processes of its own, and what its runs leave behind."""

import contextlib
import csv
import io
import os
import subprocess
import sys
import uuid
from collections.abc import Iterable
from pathlib import Path

import numpy as np

TINY = (
    "model.hidden=32", "model.ffn=64", "model.heads=4", "model.max_length=128", "model.hidden_dropout=0",
    "batch.cells=8", "validation.cells=24", "data.baseline_cells=64", "log_every=1", "logger=csv",
)  # fmt: skip
STEPS = 12  # of the runs that several files' tests read
OF_THE_MACHINE = ("tokens_per_second", "data_wait", "engine", "memory_gib", "save_stall")  # columns, not of the run
WAIT = 240  # seconds for a command; one that hangs fails the test
MARK = "MEGACELL_TEST_FAMILY"  # in the environment of a command and of all that it starts


class Command:
    """A running command; ``family`` finds every process that it or a child of it has started, orphans too."""

    def __init__(self, *words: object, script: tuple = ("-m", "megacell"), **options):
        self.mark = uuid.uuid4().hex
        paths = os.pathsep.join(path for path in sys.path if path)
        environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", MARK: self.mark}
        self.process = subprocess.Popen(
            [sys.executable, *map(str, (*script, *words))], env=environment, text=True, start_new_session=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options,
        )  # fmt: skip

    def end(self) -> tuple[int, str, str]:
        """Wait; return exit code, stdout and stderr."""
        out, err = self.process.communicate(timeout=WAIT)
        return self.process.returncode, out, err

    def family(self) -> list[int]:
        """Return the ids of the living processes that carry the command's mark."""
        return [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit() and self._marked(entry)]

    def _marked(self, process: Path) -> bool:
        try:
            zombie = (process / "stat").read_text().rpartition(")")[2].split()[0] == "Z"
            return not zombie and f"{MARK}={self.mark}".encode() in (process / "environ").read_bytes().split(b"\0")
        except (OSError, IndexError):  # it has just ended, or is another user's
            return False


def fine(*words: object, **options) -> str:
    """Run a command that has to succeed; return what it printed."""
    code, out, err = Command(*words, **options).end()
    assert code == 0, f"exit code {code}\n{out}\n{err}"
    return out


def metrics(run: Path) -> list[dict[str, str]]:
    """Return the rows of a run's metrics.csv, as text."""
    with open(run / "metrics.csv", newline="") as file:
        return list(csv.DictReader(file))


def figures(run: Path) -> list[dict[str, str]]:
    """Return the rows of metrics.csv without what depends on the machine."""
    return [{name: value for name, value in row.items() if name not in OF_THE_MACHINE} for row in metrics(run)]


def last_step(run: Path) -> int:
    """Return the last step that a run has logged, 0 before the first."""
    rows = metrics(run) if (run / "metrics.csv").exists() else []
    return int(rows[-1]["step"] or 0) if rows else 0


def checkpoints(run: Path) -> list[int]:
    """Return the steps of a run's checkpoints."""
    return sorted(int(path.name.removeprefix("step-")) for path in (run / "checkpoints").glob("step-*"))


def tensors(checkpoint: Path) -> dict[str, np.ndarray]:
    """Return every tensor of a checkpoint: weights and the optimizer's state; bfloat16, which numpy lacks, as int16."""
    import torch

    from megacell.training.distributed import device

    with device.single_process():
        from megatron.core import dist_checkpointing

        found = dist_checkpointing.load_plain_tensors(str(checkpoint))
        whole = {name: tensor for name, tensor in found.items() if torch.is_tensor(tensor)}
        return {k: (v.view(torch.int16) if v.dtype is torch.bfloat16 else v).numpy() for k, v in whole.items()}


def here(*words: object) -> tuple[int, str, str]:
    """Run a command in this process, which has paid for its imports; return exit code, stdout and stderr."""
    from megacell.core.cli.main import main

    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = main([str(word) for word in words])
        except SystemExit as end:  # argparse's way to refuse
            code = end.code
    return code, out.getvalue(), err.getvalue()


def everything_in(folder: Path) -> dict[str, bytes]:
    """Return each file below a folder with its bytes."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def one_line(text: str, *parts: str) -> None:
    """Assert that an error is one line that holds each part."""
    lines = text.strip().splitlines()
    assert len(lines) == 1, text
    for part in parts:
        assert part in lines[0], f"{part!r} is not in: {lines[0]}"


def differing(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> Iterable[str]:
    """Return the names of tensors that are not the same bit for bit."""
    assert one.keys() == other.keys()
    return [name for name in one if one[name].tobytes() != other[name].tobytes()]
