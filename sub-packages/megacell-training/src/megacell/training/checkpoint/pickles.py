# SPDX-License-Identifier: Apache-2.0
"""The pickles inside a checkpoint, read in restricted ways before torch reads them through open ones."""

import io
import pickle
import re
import stat
import zipfile
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch

from megacell.core.errors import DataError
from megacell.training.foreign.pickled import check_pickle
from megacell.training.foreign.plain import read_json, shown
from megacell.training.foreign.torch_file import Part, check_torch_file

LARGEST = 1 << 28  # bytes of a pickle: names, places and sizes, no weights
BACKENDS = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}
BROKEN = (OSError, ValueError, TypeError, AttributeError, LookupError, EOFError, RuntimeError, MemoryError, ImportError,
          OverflowError, zipfile.BadZipFile)  # fmt: skip


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
            raise pickle.UnpicklingError(f"{module}.{name}"[:80])
        return super().find_class(module, name)


def refuse_foreign_pickles(checkpoint: Path, files: Collection[str]) -> None:
    """Read what a checkpoint says of itself in restricted ways before torch and Megatron read it through open ones.

    Parameters
    ----------
    checkpoint : Path
    files : collection of str
        Those that were looked at, by their sizes and hashes.

    Raises
    ------
    DataError
        ``.metadata``, ``common.pt`` or ``metadata.json`` hold what no checkpoint of ours does, or lead to other files.
    """
    _check_metadata(checkpoint / ".metadata", files)
    _check_common(checkpoint / "common.pt")
    place = checkpoint / "metadata.json"
    try:
        found = read_json(place)
        if found != BACKENDS:
            raise ValueError(f"it holds {shown(str(found))}")
    except (OSError, ValueError) as error:
        raise DataError(f"{place}: not that of a checkpoint of ours ({error}); take another checkpoint") from None


def _check_metadata(path: Path, files: Collection[str]) -> None:
    """Read torch's ``.metadata``, which tensors there are and where in which file, and go through those places."""
    try:
        content = _read(path)
        check_pickle(content)
        found = MetadataUnpickler(io.BytesIO(content)).load()
        parts: dict[str, list[tuple[int, int]]] = {}
        for place in found.storage_data.values():
            if place.relative_path not in files:
                raise pickle.UnpicklingError(f"the name {shown(place.relative_path)}")
            parts.setdefault(place.relative_path, []).append((int(place.offset), int(place.length)))
        for name, places in parts.items():
            with open(path.with_name(name), "rb") as file:
                for offset, length in places:
                    check_torch_file(Part(file, offset, length))
    except pickle.UnpicklingError as error:
        raise DataError(f"{path}: holds {error}, which no checkpoint of ours does: refused") from error
    except BROKEN as error:
        raise DataError(f"{path}: cannot be read ({_one_line(error)}); take another checkpoint") from error


def _check_common(path: Path) -> None:
    """Read Megatron's ``common.pt``: what is not cut over ranks."""
    try:
        content = io.BytesIO(_read(path))
        check_torch_file(content)
        content.seek(0)
        torch.load(content, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        named = re.search(r"GLOBAL (\S{1,80})", str(error))
        what = named[1] if named else _one_line(error)
        raise DataError(f"{path}: holds {what}, which no checkpoint of ours does: refused") from error
    except BROKEN as error:
        raise DataError(f"{path}: cannot be read ({_one_line(error)}); take another checkpoint") from error


def _read(path: Path) -> bytes:
    """Return a file's bytes; ValueError for no plain file, or one that is larger than it can need."""
    state = path.stat()
    if not stat.S_ISREG(state.st_mode) or state.st_size > LARGEST:
        raise ValueError(f"no plain file of at most {LARGEST:,} bytes")
    return path.read_bytes()


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
