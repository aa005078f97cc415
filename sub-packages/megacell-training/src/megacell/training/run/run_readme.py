# SPDX-License-Identifier: Apache-2.0
"""README.md of a run folder: how the run was made, and how to go on with it, export it and look at it."""

import shlex
import sys
from datetime import UTC, datetime
from pathlib import Path
from platform import node

import torch
from omegaconf import DictConfig, OmegaConf

from megacell.core.files import write_whole
from megacell.core.versions import installed_version
from megacell.training.distributed import launch
from megacell.training.family import About

NAME = "README.md"
_TEXT = """\
# {name}

A training of Megacell {version}. All commands below may be typed in any folder.

## To do with it

| | |
|---|---|
| go on, from the newest checkpoint | `megacell pretrain out={run} resume=true` |
| curves, while it trains too | `tensorboard --logdir {run}/logs` |
{commands}

## What is in it

| | |
|---|---|
| `config.yaml` | all options it was started with |
| `metrics.csv` | loss, speed and memory, a row every {log_every} steps and at each validation |
| `checkpoints/` | the newest {keep}; each is whole or not there |
| `logs/` | what TensorBoard reads |
| `summary.json` | at the end: the step, whether it is finished, the baselines' losses |
{files}

## How it was made

{made_from}

```yaml
{options}```

## When it was started

"""


def write_readme(out: Path, cfg: DictConfig, about: About) -> None:
    """Write a new run's README.md; of a run that goes on, add to it that it does.

    Parameters
    ----------
    out : Path
        The run folder.
    cfg : DictConfig
    about : About
        The family's part.
    """
    path = out / NAME
    text = path.read_text(encoding="utf-8") if cfg.resume and path.exists() else _text(out, cfg, about)
    write_whole(path, (text + _started(cfg)).encode())


def _text(out: Path, cfg: DictConfig, about: About) -> str:
    return _TEXT.format(
        name=out.name, version=installed_version(), run=shlex.quote(str(out.resolve())),
        log_every=cfg.log_every, keep=cfg.checkpoint.keep,
        commands="\n".join(f"| {what} | `{command}` |" for what, command in about.commands),
        files="\n".join(f"| `{name}` | {what} |" for name, what in about.files),
        made_from=about.made_from, options=OmegaConf.to_yaml(cfg),
    )  # fmt: skip


def _started(cfg: DictConfig) -> str:
    when = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    where = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    ranks = launch.world_size(cfg.devices)
    how = f"{ranks} process{'es' if ranks > 1 else ''} ({where}), torch {torch.__version__}"
    return f"- {when} on {node()}, {how}, in {Path.cwd()}:\n\n      {command(sys.argv)}\n\n"


def command(argv: list[str]) -> str:
    """Return what was typed, of the arguments of a process that ``megacell pretrain`` runs in."""
    words = [word for word in argv[1:] if word != "--debug"]
    if words[:1] != ["pretrain"]:
        return "(from Python, with the options above)"
    return shlex.join(["megacell", *words])
