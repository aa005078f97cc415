# SPDX-License-Identifier: Apache-2.0
"""The weights in a Hugging Face directory, one tensor at a time, by the names that they have there."""

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors import safe_open

from megacell.core.errors import DataError
from megacell.training.foreign.plain import read_json
from megacell.training.interchange.safe_archive import BROKEN, load_tensors, one_line
from megacell.training.interchange.tensors import State

WEIGHTS = "model.safetensors"
LARGEST_INDEX = 1 << 26  # bytes


def find_tensors(path: Path) -> State:
    """Return all tensors of a directory: safetensors, whole or in shards, else torch's with ``weights_only``.

    Raises
    ------
    DataError
        There are none, or damaged ones; also when one of them is asked for.
    """
    try:
        if (index := path / f"{WEIGHTS}.index.json").is_file():
            names = sorted(set(read_json(index, LARGEST_INDEX)["weight_map"].values()))
            if any(Path(name).name != name or name in ("", "..") for name in names):
                raise ValueError(f"{index.name} names files outside of the folder")
            return _Mapped(path, names)
        if (path / WEIGHTS).is_file():
            return _Mapped(path, [WEIGHTS])
        if (pickled := path / "pytorch_model.bin").is_file():
            with open(pickled, "rb") as file:
                return load_tensors(file, str(pickled))
    except BROKEN as error:
        raise _unreadable(path, error) from None
    raise DataError(f"{path}: has neither {WEIGHTS} nor pytorch_model.bin; give the whole directory")


def _unreadable(path: Path, error: BaseException) -> DataError:
    return DataError(f"{path}: its weights cannot be read, or are refused ({one_line(error)}); fetch them again")


class _Mapped(Mapping[str, torch.Tensor]):
    """Tensors of safetensors files, each mapped only while it is held: all of them would take their size in memory."""

    def __init__(self, folder: Path, names: list[str]) -> None:
        self._folder, self._files = folder, dict[str, Path]()
        for file in (folder / name for name in names):
            with safe_open(file, "pt") as opened:
                self._files |= dict.fromkeys(opened.keys(), file)

    def __getitem__(self, name: str) -> torch.Tensor:
        file = self._files[name]
        try:
            with safe_open(file, "pt") as opened:
                tensor: torch.Tensor = opened.get_tensor(name)
                return tensor
        except BROKEN as error:
            raise _unreadable(self._folder, error) from None

    def __contains__(self, name: object) -> bool:
        return name in self._files

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)
