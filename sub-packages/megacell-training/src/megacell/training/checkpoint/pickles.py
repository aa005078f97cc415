# SPDX-License-Identifier: Apache-2.0
"""The pickles inside a checkpoint, read in restricted ways before torch reads them through open ones."""

import pickle
import re
from pathlib import Path
from typing import Any

import torch

from megacell.core.errors import DataError


class MetadataUnpickler(pickle.Unpickler):
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

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self.ADMITTED:
            raise pickle.UnpicklingError(f"{module}.{name}")
        return super().find_class(module, name)


def refuse_foreign_pickles(checkpoint: Path) -> None:
    """Read the pickles of a checkpoint in restricted ways before torch reads ``.metadata`` through an open one."""
    path = checkpoint / ".metadata"
    try:
        with open(path, "rb") as file:
            MetadataUnpickler(file).load()
    except pickle.UnpicklingError as error:
        raise DataError(f"{path}: holds {error}, which no checkpoint of ours does: refused") from error
    try:
        torch.load(path := checkpoint / "common.pt", map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        named = re.search(r"GLOBAL (\S+)", str(error))
        what = named[1] if named else "no state"
        raise DataError(f"{path}: holds {what}, which no checkpoint of ours does: refused") from error
