# SPDX-License-Identifier: Apache-2.0
"""The checkpoint that a path means: itself, the newest of a run, or the best."""

import logging
from pathlib import Path

from megacell.core.errors import DataError, UsageError
from megacell.training.checkpoint import checkpoint

BEST = "best"  # RUN/best: of a run's checkpoints, the one of the lowest held-out loss
log = logging.getLogger(__name__)


def find_checkpoint(path: Path) -> Path:
    """Return the checkpoint that ``path`` is, the newest whole one of the run that it is, or the best for RUN/best."""
    if path.name == BEST and not path.exists() and (path.parent / "checkpoints").is_dir():
        return checkpoint.best(path.parent / "checkpoints")
    if (path / checkpoint.MARKER).is_file():
        checkpoint.check(path)
        return path
    if (path / "checkpoints").is_dir():
        newest, lines = checkpoint.newest(path / "checkpoints")
        if newest is None:
            raise DataError(f"{path}: no whole checkpoint in it {'; '.join(lines)}".rstrip())
        for line in lines:
            log.warning(line)
        return newest
    if not path.exists():
        raise UsageError(f"{path}: no such file or folder")
    raise UsageError(f"{path}: neither a .nemo file, a Hugging Face directory, a run folder nor a checkpoint")
