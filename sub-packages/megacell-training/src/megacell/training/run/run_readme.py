# SPDX-License-Identifier: Apache-2.0
"""README.md of a run folder: how the run was made, and how to go on with it, export it and look at it."""

import shlex
import sys
from datetime import UTC, datetime
from pathlib import Path
from platform import node
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from megacell.core.cli.main import installed_version
from megacell.core.files import write_whole
from megacell.training.distributed import launch

NAME = "README.md"
_TEXT = """\
# {name}

A training of Megacell {version}. All commands below may be typed in any folder.

## To do with it

| | |
|---|---|
| go on, from the newest checkpoint | `megacell pretrain out={run} resume=true` |
| held-out loss beside baselines | `megacell evaluate {run} {store}` |
| one portable file | `megacell export {run} --to nemo --out {run}/model.nemo` |
| cells' embeddings | `megacell embed {run} CELLS.h5ad --out EMBEDDED.h5ad` |
| one page that shows it all | `megacell report {run}` |
| curves, while it trains too | `tensorboard --logdir {run}/logs` |
| a new run from its weights | `megacell pretrain init={run} vocabulary={run}/vocabulary store=STORE out=NEW` |

## What is in it

| | |
|---|---|
| `config.yaml` | all options it was started with |
| `vocabulary/` | a copy of the vocabulary |
| `metrics.csv` | loss, speed and memory, a row every {log_every} steps and at each validation |
| `checkpoints/` | the newest {keep}; each is whole or not there |
| `baselines.npz` | the frequency baselines, fitted on training cells |
| `logs/` | what TensorBoard reads |
| `summary.json` | at the end: the step, whether it is finished, the baselines' losses |

## How it was made

Store {store}: {cells} cells, generation {generation}, digest {digest}. Vocabulary {vocabulary}: {genes} genes, sha256
{hash}.

```yaml
{options}```

## When it was started

"""


def write_readme(out: Path, cfg: DictConfig, data: Any) -> None:
    """Write a new run's README.md; of a run that goes on, add to it that it does.

    Parameters
    ----------
    out : Path
        The run folder.
    cfg : DictConfig
    data : megacell.geneformer.training.data.TrainingData
    """
    path = out / NAME
    text = path.read_text(encoding="utf-8") if cfg.resume and path.exists() else _about(out, cfg, data)
    write_whole(path, (text + _started(cfg)).encode())


def _about(out: Path, cfg: DictConfig, data: Any) -> str:
    return _TEXT.format(
        name=out.name, version=installed_version(), run=shlex.quote(str(out.resolve())),
        store=shlex.quote(str(Path(cfg.store).resolve())), log_every=cfg.log_every, keep=cfg.checkpoint.keep,
        cells=f"{len(data.store):,}", generation=data.store.generation, digest=data.store.digest,
        vocabulary=data.vocabulary.name, genes=f"{len(data.vocabulary.gene_ids):,}", hash=data.vocabulary.hash,
        options=OmegaConf.to_yaml(cfg),
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
