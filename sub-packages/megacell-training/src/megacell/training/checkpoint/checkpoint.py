# SPDX-License-Identifier: Apache-2.0
"""Checkpoints: saved whole or not at all, found, checked and loaded. The only file that knows how they lie on disk.

``RUN/checkpoints/step-00000100/`` holds Megatron's distributed checkpoint (any layout of ranks reads it) and
``checkpoint.json``, written last: what it is a checkpoint of, and every file's size and xxh3. The folder gets its name
by a rename once all of it is on disk. Order of cells, masking, dropout and learning rate are functions of the step,
so that weights, the optimizer's state and the step are all there is to save.
"""

import contextlib
import math
import re
import shutil
from pathlib import Path
from typing import Any

import torch

from megacell.core.errors import DataError
from megacell.core.files import hash_file
from megacell.training.checkpoint.pickles import refuse_foreign_pickles
from megacell.training.foreign.plain import check_shape, read_json, refuse_references, shown

FORMAT, VERSION = "megacell-checkpoint", 1
MARKER = "checkpoint.json"
NAME = re.compile(r"step-(\d{8})")
LARGEST = 1 << 26  # bytes of the marker, which names all files of all ranks
FACTS = {  # what the marker holds whatever the family
    "step": int,
    "files": {"*": (int, str)},
    "precision?": str,
    "family?": str,
    "held_out_loss?": int | float,
    "stream?": {"*": int | str},
    "guard?": {"skipped": int, "*": [int | float]},
    "ranks?": {"world": int, "tensor": int},
    "versions?": {"*": str},
}
SHARDING = {"distrib_optim_sharding_type": "fully_reshardable"}  # Megatron's form that any layout can load


def read_facts(checkpoint: Path) -> dict[str, Any]:
    """Return ``checkpoint.json``; DataError if the checkpoint is not whole, or says what none of ours does."""
    try:
        facts: dict[str, Any] = read_json(checkpoint / MARKER, LARGEST)
    except (OSError, ValueError) as error:
        raise DataError(f"{checkpoint}: no readable {MARKER}: not a whole checkpoint; take another") from error
    try:
        check_shape(facts, {"format": str, "version?": int})
        if facts["format"] != FORMAT or facts.get("version", 0) > VERSION:
            told = f"{shown(facts['format'])} version {facts.get('version')}"
            raise DataError(f"{checkpoint}: {told}: needs a newer Megacell")
        check_shape(facts, FACTS)
        refuse_references(facts)
        if odd := next((name for name in facts["files"] if Path(name).name != name), None):
            raise ValueError(f"files names {shown(odd)}, which is no file of the checkpoint")
    except ValueError as error:
        raise DataError(f"{checkpoint / MARKER}: {error}; take another checkpoint") from None
    return facts


def check(checkpoint: Path) -> dict[str, Any]:
    """Return the facts of a checkpoint whose every file has its size and xxh3; DataError names the one that has not."""
    facts = read_facts(checkpoint)
    for name, (size, digest) in facts["files"].items():
        path = checkpoint / name
        if not path.is_file() or path.stat().st_size != size or hash_file(path) != digest:
            raise DataError(
                f"{path}: missing or damaged (expected {size:,} bytes, xxh3 {digest}); take another checkpoint"
            )
    return facts


def newest(folder: Path) -> tuple[Path | None, list[str]]:
    """Return the newest whole checkpoint of ``RUN/checkpoints``, and a line for each newer one that was passed over."""
    lines: list[str] = []
    for checkpoint in reversed(_found(folder)):
        try:
            check(checkpoint)
        except DataError as error:
            lines.append(f"passed over: {error}")
        else:
            return checkpoint, lines
    return None, lines


def _found(folder: Path) -> list[Path]:
    return sorted(p for p in folder.glob("step-*") if NAME.fullmatch(p.name))


def _by_loss(folder: Path) -> list[Path]:
    """Return the checkpoints that were validated, those of the lowest held-out loss first, of equals the newest."""
    losses = {}
    for path in _found(folder):
        with contextlib.suppress(DataError):
            losses[path] = read_facts(path).get("held_out_loss")
    return sorted((p for p in losses if losses[p] is not None), key=lambda p: (losses[p], -int(p.name[-8:])))


def best_loss(folder: Path) -> float:
    """Return the lowest held-out loss of the checkpoints in ``RUN/checkpoints``; infinity if none was validated."""
    return next((read_facts(path)["held_out_loss"] for path in _by_loss(folder)), math.inf)


def best(folder: Path) -> Path:
    """Return the checkpoint of the lowest held-out loss in ``RUN/checkpoints``; DataError if none has one."""
    if not (ranked := _by_loss(folder)):
        raise DataError(f"{folder}: no checkpoint with a held-out loss in it; take the run itself, or a checkpoint")
    check(ranked[0])
    return ranked[0]


def prune(folder: Path, keep: int, best: int) -> None:
    """Remove checkpoints but the newest ``keep`` and the ``best`` of the lowest held-out loss."""
    found = _found(folder)
    stay = {*found[-keep:], *_by_loss(folder)[:best]}
    for path in found:
        if path not in stay:
            shutil.rmtree(path)


def sharding() -> dict[str, Any]:
    """Return how Megatron is to lay weights and optimizer state out."""
    from megatron.core import parallel_state

    return {**SHARDING, "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True)}


def _wanted(network: Any, optimizer: Any) -> dict[str, Any]:
    """Return what this rank wants of a checkpoint, in Megatron's form."""
    model = network.sharded_state_dict(metadata=sharding())
    state = {"model": {name: part for name, part in model.items() if not name.endswith("_extra_state")}}
    if optimizer is not None:
        state["optimizer"] = optimizer.sharded_state_dict(state["model"], is_loading=True, metadata=sharding())
    return state


def load(checkpoint: Path, network: Any, optimizer: Any = None) -> dict[str, Any]:
    """Load weights, and the optimizer's state where one is given, into what stands on this rank; returns the facts.

    The layout of ranks need not be the one that saved it. The files were checked by ``newest`` or ``check``.
    """
    from megatron.core import dist_checkpointing

    facts = read_facts(checkpoint)
    refuse_foreign_pickles(checkpoint, facts["files"])
    if optimizer is not None:
        _prepare(optimizer)
    loaded = dist_checkpointing.load(_wanted(network, optimizer), str(checkpoint))
    network.load_state_dict(loaded["model"], strict=False)
    if optimizer is not None:
        optimizer.load_state_dict(loaded["optimizer"])
        _separate_steps(optimizer)
    return facts


def _prepare(optimizer: Any) -> None:
    """Mend two gaps of Megatron 0.16.1 with torch's Adam: state that is not there yet, and its per-parameter step."""
    from megatron.core.optimizer.distrib_optimizer import HAVE_APEX_OR_TE

    from megacell.training.engine import parts

    begin_state(optimizer)
    for part in parts(optimizer):
        if HAVE_APEX_OR_TE:
            continue

        def copy_states(model_param: torch.nn.Parameter, tensors: dict[str, torch.Tensor], part: Any = part) -> None:
            group, order = part.model_param_group_index_map[model_param]
            main = part.optimizer.param_groups[group]["params"][order]
            main.data.copy_(tensors["param"])
            for key, value in tensors.items():
                if key != "param":
                    part.optimizer.state[main][key].copy_(value)

        part._set_main_param_and_optimizer_states = copy_states


def begin_state(optimizer: Any) -> None:
    """Make the optimizer's state of step 0, which torch makes at the first update: that one may come after a save."""
    from megacell.training.engine import parts

    for part in parts(optimizer):
        groups = part.optimizer.param_groups
        rates = [group["lr"] for group in groups]
        for group in groups:
            group["lr"] = 0.0  # Megatron makes the state by an update, whose weight decay must not change the weights
        part._init_optimizer_states_with_dummy_values()
        for group, rate in zip(groups, rates, strict=True):
            group["lr"] = rate
            if "step" in group:
                group["step"] = 0
        for state in part.optimizer.state.values():
            if isinstance(state.get("step"), torch.Tensor):
                state["step"].zero_()


def _separate_steps(optimizer: Any) -> None:
    """Give each parameter a step of its own: Megatron hands all of them one tensor, which each update would raise.

    Which kernel counts them, and where, is this machine's choice, not that of the one that wrote the file.
    """
    from megacell.training.engine import fuse, parts

    for part in parts(optimizer):
        for state in part.optimizer.state.values():
            if isinstance(state.get("step"), torch.Tensor):
                state["step"] = state["step"].clone()
    fuse(optimizer)
