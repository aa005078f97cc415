# SPDX-License-Identifier: Apache-2.0
"""A run as a Slurm job that saves before its time is up and is queued again, until the run is done."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

from omegaconf import DictConfig

from megacell.core.errors import UsageError
from megacell.core.files import write_whole
from megacell.training.config.settings import SAVED
from megacell.training.distributed.launch import INTERRUPTED

SCRIPT = """\
#!/bin/bash
{directives}
# Written by megacell pretrain launcher=srun. Exit code {interrupted}: a checkpoint was saved, and there is more to do.
{setup}
if [ -e {saved} ]; then
    settings=({again})
else
    settings=({settings})
fi
# once a rank has ended the others have 30 s to end by themselves: all save, and then end one by one
srun --wait=30 {python} -m megacell pretrain "${{settings[@]}}"
code=$?
if [ $code -eq {interrupted} ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit $code
"""


def script(cfg: DictConfig, overrides: list[str]) -> str:
    """Return the batch script of a run; ``overrides`` are those of its command line."""
    launcher, out = cfg.launcher, Path(cfg.out).resolve()
    own = [o for o in overrides if not o.lstrip("+~").startswith(("launcher", "out="))] + [f"out={out}"]
    again = own if cfg.resume else [f"out={out}", "resume=true"]
    lines = [
        f"--job-name={out.name}", f"--nodes={launcher.nodes}", f"--ntasks-per-node={cfg.devices}",
        f"--time={launcher.time}", f"--signal=USR1@{launcher.signal}", "--requeue", "--open-mode=append",
        f"--output={out}.log",
        *([f"--gpus-per-node={cfg.devices}"] if launcher.gpus else []),
        *([f"--cpus-per-task={launcher.cpus}"] if launcher.cpus else []),
        *launcher.options,
    ]  # fmt: skip
    return SCRIPT.format(
        directives="\n".join(f"#SBATCH {line}" for line in lines),
        interrupted=INTERRUPTED,
        setup=launcher.setup,
        saved=shlex.quote(str(out / SAVED)),
        settings=shlex.join(own),
        again=shlex.join(again),
        python=shlex.quote(sys.executable),
    )


def submit(cfg: DictConfig, overrides: list[str]) -> int:
    """Write the batch script beside the run folder, and hand it to sbatch; returns the exit code.

    Raises
    ------
    UsageError
        There is no sbatch here.
    """
    path = Path(f"{Path(cfg.out).resolve()}.sbatch")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, script(cfg, overrides).encode())
    print(f"{path}: {cfg.launcher.nodes} x {cfg.devices} tasks")
    if not cfg.launcher.submit:
        return 0
    try:
        return subprocess.run(["sbatch", os.fspath(path)], check=False).returncode
    except FileNotFoundError:
        raise UsageError(f"sbatch: not found here; submit {path} where Slurm is") from None
