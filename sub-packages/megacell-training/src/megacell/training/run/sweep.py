# SPDX-License-Identifier: Apache-2.0
"""Several runs by one command: Hydra's multirun over `megacell pretrain`, each run in processes of its own."""

import json
import math
import subprocess
import sys
from pathlib import Path
from unittest import mock

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from megacell.core.errors import UsageError
from megacell.training.config.overrides import key_of, value_of
from megacell.training.config.settings import ELSEWHERE, as_texts, family_of, searchpath

OURS = (  # a run's folder is SWEEP/0, SWEEP/1, …, and Hydra puts nothing into it; loggers stay as they are
    "hydra.sweep.dir=${out}", "hydra.sweep.subdir=${hydra.job.num}", "hydra.output_subdir=null",
    "hydra/job_logging=none",
)  # fmt: skip


def main(overrides: list[str]) -> int:
    """Run ``megacell pretrain --multirun``; Hydra ends the process with 1 where a run fails.

    Raises
    ------
    UsageError
        ``out`` is missing or holds something, or the launcher cannot be one of a sweep.
    """
    given = {key_of(o): value_of(o) for o in overrides}
    if not given.get("out"):
        raise UsageError("out=… must be given: the folder of the runs")
    if Path(given["out"]).exists():
        raise UsageError(f"{given['out']} exists: choose another out=")
    if given.get("launcher", "submitit") not in ("local", "submitit"):
        raise UsageError(f"launcher={given['launcher']}: with --multirun choose local or submitit")
    family = family_of(overrides)
    overrides = as_texts(overrides, family, several=True)
    with mock.patch.object(sys, "argv", ["pretrain", "--multirun", *OURS, searchpath(), *overrides]):
        hydra.main(version_base="1.3", config_path=str(family.configs), config_name="pretrain")(one)()
    return 0


def one(cfg: DictConfig) -> float:
    """Train one of the runs; returns its last held-out loss, which a search makes small."""
    job = HydraConfig.get()
    out = Path(job.runtime.output_dir)
    chosen = [o for o in job.overrides.task if key_of(o).split(".")[0] not in ("out", *ELSEWHERE)]
    command = [sys.executable, "-m", "megacell", "pretrain", *chosen, f"out={out}"]
    code = subprocess.run(command, check=False).returncode
    if code:
        raise RuntimeError(f"{out}: ended with exit code {code}")
    loss = json.loads((out / "summary.json").read_text())["held_out_loss"]
    print(f"{out}: held-out loss {loss:.3f}")
    return loss if math.isfinite(loss) else math.inf
