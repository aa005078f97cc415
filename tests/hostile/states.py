# SPDX-License-Identifier: Apache-2.0
"""What a user finds of a command's output at a moment: old, new, or half; and all that it ends with, to compare."""

import hashlib
import io
import json
import re
import sys
import tarfile
from pathlib import Path

import numpy as np

sys.path.append(str(Path(__file__).resolve().parents[1]))

import runs

ABSENT = "absent"


def digest(*parts: bytes) -> str:
    """Return a short hash."""
    joined = hashlib.sha256()
    for part in parts:
        joined.update(hashlib.sha256(part).digest())
    return joined.hexdigest()[:16]


def files_of(path: Path) -> dict[str, str]:
    """Return the hash of a file, or of every file below a folder, by its path."""
    if path.is_file():
        return {path.name: digest(path.read_bytes())}
    return {f"{path.name}/{name}": digest(content) for name, content in runs.everything_in(path).items()}


def tree(path: Path) -> str:
    """Return a file or folder as one hash, or `ABSENT`."""
    return digest(json.dumps(files_of(path)).encode()) if path.exists() else ABSENT


def store(path: Path) -> str:
    """Return generation, digest, damages and content of a store, read as a user reads it."""
    from megacell.store import CellStore
    from megacell.store.format.verify import verify

    if not (path / "manifest.json").exists():
        return ABSENT
    opened = CellStore.open(path)
    rows = opened.rows(slice(None))
    # between the two renames of a commit the next generation's own copy is there already
    damages = [each for each in verify(path).damages if f"manifest-{opened.generation}.json" not in each]
    content = digest(rows.indptr.tobytes(), rows.indices.tobytes(), rows.data.tobytes(), opened.obs.to_csv().encode())
    return f"{opened.generation} {opened.digest} {content} {damages}"


def archive(path: Path) -> dict[str, str]:
    """Return the hash of each member of a .nemo file, of weights tensor by tensor: a tar has times in it."""
    import torch

    found = {}
    with tarfile.open(path) as tar:
        for member in tar.getmembers():
            content = tar.extractfile(member).read() if member.isfile() else b""
            if member.name.endswith(".ckpt"):
                tensors = torch.load(io.BytesIO(content), weights_only=True)
                found |= {name: digest(tensor.numpy().tobytes()) for name, tensor in tensors.items()}
            elif member.isfile():
                found[member.name] = digest(content)
    return found


def page(path: Path) -> dict[str, str]:
    """Return the hash of an HTML page without the minute at which it was made."""
    return {path.name: digest(re.sub(rb"Page made [-0-9: ]+ UTC", b"", path.read_bytes()))}


def embedded(path: Path) -> dict[str, str]:
    """Return what `embed` has added to a file, and the counts and names beside it."""
    import anndata

    cells = anndata.read_h5ad(path)
    counts = cells.X.tocsr()
    return {
        "embeddings": digest(np.ascontiguousarray(cells.obsm["X_megacell"]).tobytes()),
        "obs": digest(cells.obs.to_csv().encode()),
        "facts": digest(json.dumps(cells.uns["megacell"], default=str, sort_keys=True).encode()),
        "counts": digest(counts.data.tobytes(), counts.indices.tobytes()),
    }


def run(path: Path) -> dict[str, str]:
    """Return what a finished run is compared by: figures, settings, and every tensor of its last checkpoint."""
    last = runs.checkpoints(path)[-1]
    tensors = runs.tensors(path / "checkpoints" / f"step-{last:08d}")
    rows = enumerate(runs.figures(path))
    return {
        **{f"row {number} of metrics.csv, step {row['step']}": json.dumps(row) for number, row in rows},
        "summary.json": (path / "summary.json").read_text(),
        **files_of(path / "vocabulary"),
        **{f"{last} {name}": digest(tensor.tobytes()) for name, tensor in tensors.items()},
    }


def saved(path: Path, *, at_least: int = 0) -> str:
    """Return "whole" where all checkpoints of a run that have a name are whole and reach a step; else what is wrong."""
    from megacell.training.checkpoint import checkpoint

    steps = runs.checkpoints(path)
    if max(steps, default=0) < at_least:
        return f"step {at_least} had been saved; now there are {steps}"
    for step in steps:
        checkpoint.check(path / "checkpoints" / f"step-{step:08d}")
    return "whole"
