# SPDX-License-Identifier: Apache-2.0
"""Checkpoints: saved whole or not at all, found, checked and loaded. The only file that knows how they lie on disk.

``RUN/checkpoints/step-00000100/`` holds Megatron's distributed checkpoint (any layout of ranks reads it) and
``checkpoint.json``, written last: what it is a checkpoint of, and every file's size and xxh3. The folder gets its name
by a rename once all of it is on disk. Order of cells, masking, dropout and learning rate are functions of the step,
so that weights, the optimizer's state and the step are all there is to save.
"""

import json
import pickle
import queue
import re
import shutil
import signal
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException

from megacell.store.durable import flush_file, hash_file, move_into_place
from megacell.store.errors import DataError

FORMAT, VERSION = "megacell-checkpoint", 1
MARKER = "checkpoint.json"
NAME = re.compile(r"step-(\d{8})")
SHARDING = {"distrib_optim_sharding_type": "fully_reshardable"}  # Megatron's form that any layout can load


class Signals:
    """Notes SIGTERM, SIGUSR1 and Ctrl-C: the step in hand is finished and saved; a second Ctrl-C ends at once."""

    def __init__(self) -> None:
        self.received: int | None = None
        self._previous: dict[int, Any] = {}

    def watch(self) -> None:
        """Take the signals over."""
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            self._previous[number] = signal.signal(number, self._note)

    def release(self) -> None:
        """Give the signals back."""
        while self._previous:
            number, handler = self._previous.popitem()
            signal.signal(number, handler)

    def _note(self, number: int, frame: object) -> None:
        if self.received == number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = number


def _state(bert, optimizer=None, *, loading: bool) -> dict:
    from megatron.core import parallel_state

    metadata = {**SHARDING, "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True)}
    model = bert.sharded_state_dict(metadata=metadata)
    # an _extra_state is pickled bytes, which torch would read back through an open unpickler; ours are empty
    state = {"model": {name: part for name, part in model.items() if not name.endswith("_extra_state")}}
    if optimizer is not None:
        state["optimizer"] = optimizer.sharded_state_dict(state["model"], is_loading=loading, metadata=metadata)
    return state


def save(folder: Path, step: int, bert, optimizer, facts: dict, keep: int) -> Path:
    """Save on all ranks, together; returns the checkpoint's folder.

    Parameters
    ----------
    folder : Path
        ``RUN/checkpoints``, seen by all ranks.
    step : int
        Optimizer steps done.
    facts : dict
        For ``checkpoint.json``: what the checkpoint belongs to.
    keep : int
        Newest checkpoints that stay.

    Raises
    ------
    DataError
        It could not be written; the checkpoints before it stay as they are.
    """
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    # Megatron's own queue lives in a process that outlasts a killed rank; saving in this process needs none
    filesystem_async._results_queue = queue.Queue()
    target = folder / f"step-{step:08d}"
    temporary = folder / f".{target.name}.partial"
    first = dist.get_rank() == 0
    if first:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    dist.barrier()
    try:
        dist_checkpointing.save(_state(bert, optimizer, loading=False), str(temporary))
        dist.barrier()
        if first:
            _finish(temporary, target, step, facts)
    except (CheckpointException, OSError, RuntimeError) as error:
        if first:
            shutil.rmtree(temporary, ignore_errors=True)
        free = shutil.disk_usage(folder).free
        raise DataError(
            f"{target}: could not be written ({free:,} bytes are free); make room, then go on with resume=true"
        ) from error
    if first:
        for old in sorted(p for p in folder.iterdir() if NAME.fullmatch(p.name))[:-keep]:
            shutil.rmtree(old)
    dist.barrier()
    return target


def _finish(temporary: Path, target: Path, step: int, facts: dict) -> None:
    """Say in the marker what the checkpoint is, wait until all of it is on disk, and give it its name."""
    files = {p.name: [p.stat().st_size, hash_file(p)] for p in sorted(temporary.iterdir())}
    content = {"format": FORMAT, "version": VERSION, "step": step, **facts, "files": files}
    (temporary / MARKER).write_text(json.dumps(content, indent=1))
    for path in temporary.iterdir():
        flush_file(path)
    shutil.rmtree(target, ignore_errors=True)
    move_into_place(temporary, target)


def read_facts(checkpoint: Path) -> dict:
    """Return ``checkpoint.json``; DataError if the checkpoint is not whole."""
    try:
        facts = json.loads((checkpoint / MARKER).read_text())
    except (OSError, ValueError) as error:
        raise DataError(f"{checkpoint}: no readable {MARKER}: not a whole checkpoint; take another") from error
    if facts.get("format") != FORMAT or facts.get("version", 0) > VERSION:
        raise DataError(f"{checkpoint}: {facts.get('format')} version {facts.get('version')}: needs a newer Megacell")
    return facts


def check(checkpoint: Path) -> dict:
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
    found = sorted((p for p in folder.glob("step-*") if NAME.fullmatch(p.name)), reverse=True)
    for checkpoint in found:
        try:
            check(checkpoint)
        except DataError as error:
            lines.append(f"passed over: {error}")
        else:
            return checkpoint, lines
    return None, lines


class _MetadataUnpickler(pickle.Unpickler):
    """Admits what torch's checkpoint ``.metadata`` is made of, and nothing that could run code."""

    ADMITTED = {
        ("torch", name)
        for name in ("Size", "device", "float32", "float64", "bfloat16", "float16", "int64", "int32", "uint8")
    } | {
        ("torch.distributed.checkpoint.metadata", name)
        for name in ("Metadata", "MetadataIndex", "TensorStorageMetadata", "TensorProperties",
                     "ChunkStorageMetadata", "StorageMeta", "_MEM_FORMAT_ENCODING")
    } | {
        ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
        ("torch.distributed.checkpoint.planner", "SavePlan"),
        ("torch.distributed.checkpoint.planner", "WriteItem"),
        ("torch.distributed.checkpoint.planner", "WriteItemType"),
        ("torch.distributed.checkpoint.planner", "TensorWriteData"),
        ("torch.distributed.checkpoint.planner", "BytesIOWriteData"),
        ("torch.serialization", "_get_layout"),
        ("collections", "OrderedDict"),
        ("pathlib", "PosixPath"),
    }  # fmt: skip

    def find_class(self, module: str, name: str):
        if (module, name) not in self.ADMITTED:
            raise pickle.UnpicklingError(f"{module}.{name}")
        return super().find_class(module, name)


def _refuse_foreign_pickles(checkpoint: Path) -> None:
    """Read the pickles of a checkpoint in restricted ways before torch reads ``.metadata`` through an open one."""
    path = checkpoint / ".metadata"
    try:
        with open(path, "rb") as file:
            _MetadataUnpickler(file).load()
    except pickle.UnpicklingError as error:
        raise DataError(f"{path}: holds {error}, which no checkpoint of ours does: refused") from error
    try:
        torch.load(path := checkpoint / "common.pt", map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        named = re.search(r"GLOBAL (\S+)", str(error))
        what = named[1] if named else "no state"
        raise DataError(f"{path}: holds {what}, which no checkpoint of ours does: refused") from error


def load(checkpoint: Path, bert, optimizer=None) -> dict:
    """Load weights, and the optimizer's state where one is given, into what stands on this rank; returns the facts.

    The layout of ranks need not be the one that saved it. The files were checked by ``newest`` or ``check``.
    """
    from megatron.core import dist_checkpointing

    facts = read_facts(checkpoint)
    _refuse_foreign_pickles(checkpoint)
    if optimizer is not None:
        _prepare(optimizer)
    loaded = dist_checkpointing.load(_state(bert, optimizer, loading=True), str(checkpoint))
    bert.load_state_dict(loaded["model"], strict=False)
    if optimizer is not None:
        optimizer.load_state_dict(loaded["optimizer"])
        _separate_steps(optimizer)
    return facts


def _distributed_optimizers(optimizer) -> list:
    return list(getattr(optimizer, "chained_optimizers", [optimizer]))


def _prepare(optimizer) -> None:
    """Mend two gaps of Megatron 0.16.1 with torch's Adam: state that is not there yet, and its per-parameter step."""
    from megatron.core.optimizer.distrib_optimizer import HAVE_APEX_OR_TE

    for part in _distributed_optimizers(optimizer):
        part._init_optimizer_states_with_dummy_values()
        if HAVE_APEX_OR_TE:
            continue

        def copy_states(model_param, tensors, part=part):
            group, order = part.model_param_group_index_map[model_param]
            main = part.optimizer.param_groups[group]["params"][order]
            main.data.copy_(tensors["param"])
            for key, value in tensors.items():
                if key != "param":
                    part.optimizer.state[main][key].copy_(value)

        part._set_main_param_and_optimizer_states = copy_states


def _separate_steps(optimizer) -> None:
    """Give each parameter a step of its own: Megatron hands all of them one tensor, which each update would raise."""
    for part in _distributed_optimizers(optimizer):
        for state in part.optimizer.state.values():
            if isinstance(state.get("step"), torch.Tensor):
                state["step"] = state["step"].clone()
