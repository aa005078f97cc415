# SPDX-License-Identifier: Apache-2.0
"""Tar archives and tensors that may come from anybody: looked at before anything is unpacked, loaded or run."""

import gzip
import os
import pickle
import shutil
import tarfile
import tempfile
import warnings
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import torch
from safetensors import SafetensorError

from megacell.core.errors import DataError
from megacell.training.foreign.torch_file import check_torch_file
from megacell.training.interchange.tensors import State

MOST_MEMBERS = 1000
SMALL = 1 << 28  # bytes of a member that is not weights
EXPANSION = 20  # weights hardly shrink when they are compressed: what grows more than this is no model
SLACK = 1 << 24  # bytes that any archive may unpack to
MOST_SHARED = 2  # times that all that is stored may be used
BROKEN = (  # what damaged or malicious files make the readers of tar, zip, safetensors and torch raise
    tarfile.TarError, SafetensorError, pickle.UnpicklingError, zipfile.BadZipFile, zipfile.LargeZipFile, OSError,
    EOFError, ValueError, TypeError, KeyError, IndexError, AttributeError, RuntimeError, MemoryError, OverflowError,
    NotImplementedError,  # zipfile, of a compression that it does not know
)  # fmt: skip


def one_line(error: BaseException) -> str:
    """Return what an error says, short and on one line."""
    return " ".join(str(error).split())[:200] or type(error).__name__


class _Bounded:
    """A file that refuses to be read beyond a number of bytes: a compressed archive may unpack to anything."""

    def __init__(self, file: Any, most: int) -> None:
        self._file, self._most = file, most
        self.seek, self.tell, self.close = file.seek, file.tell, file.close

    def read(self, size: int = -1) -> bytes:
        if size < 0 or self._file.tell() + size > self._most:
            raise DataError(f"unpacks to more than {self._most:,} bytes, {EXPANSION} times its size: refused")
        content: bytes = self._file.read(size)
        return content


class Archive:
    """The members of a tar, all of them found to be plain files and folders inside of it.

    Attributes
    ----------
    names : set of str
        Of its files, normalised.
    """

    def __init__(self, tar: tarfile.TarFile, path: Path, most: int) -> None:
        self._path, self._tar = path, tar
        self._members: dict[str, tarfile.TarInfo] = {}
        total = 0
        for number, member in enumerate(tar):
            name = os.path.normpath(member.name)
            total += member.size
            faults = {
                f"is more than {MOST_MEMBERS:,} files": number >= MOST_MEMBERS,
                "lies outside of the archive": os.path.isabs(member.name) or name.split(os.sep)[0] == os.pardir,
                "is neither file nor folder": member.type not in (*tarfile.REGULAR_TYPES, tarfile.DIRTYPE)
                or member.issparse(),
                "stands in it twice": name in self._members,
                f"takes it above {most:,} bytes, more than a model can unpack to": total > most,
            }
            for fault, found in faults.items():
                if found:
                    raise DataError(f"{path}: holds {name[:80]!r}, which {fault}: refused")
            if member.isfile():
                self._members[name] = member
        self.names = set(self._members)

    def read(self, name: str, most: int | None = None) -> bytes:
        """Return the bytes of a small file, of at most so many bytes (`SMALL` by default)."""
        if (member := self._members.get(name)) is None or member.size > (SMALL if most is None else most):
            why = "is not in it" if member is None else f"has {member.size:,} bytes, which it cannot need"
            raise DataError(f"{self._path}: {name} {why}: refused")
        with self._open(name) as file:
            return file.read()

    def tensors(self, name: str) -> State:
        """Return the tensors of a file that torch wrote; nothing in it is run."""
        with self._open(name) as file:
            if isinstance(self._tar.fileobj, _Bounded):  # compressed: it cannot be read in any order
                with tempfile.TemporaryFile() as unpacked:
                    shutil.copyfileobj(file, unpacked)
                    return load_tensors(unpacked, f"{self._path}: {name}")
            return load_tensors(file, f"{self._path}: {name}")

    def unpack(self, folder: str, out: Path) -> None:
        """Write the small files of one folder of the archive into ``out``, which is made."""
        out.mkdir()
        for name in self.names:
            if os.path.dirname(name) == folder:
                (out / os.path.basename(name)).write_bytes(self.read(name))

    def _open(self, name: str) -> IO[bytes]:
        file = self._tar.extractfile(self._members[name])
        assert file is not None  # it is a regular file
        return file


@contextmanager
def open_archive(path: Path) -> Iterator[Archive]:
    """Open a tar archive, compressed by gzip or not.

    Raises
    ------
    DataError
        No archive, a damaged one, or one with links, devices, paths that lead outside, or more in it than it can hold.
    """
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            packed = file.read(2) == b"\x1f\x8b"
            file.seek(0)
            most = (EXPANSION if packed else 1) * size + SLACK
            given: Any = _Bounded(gzip.GzipFile(fileobj=file), most) if packed else file
            with tarfile.open(fileobj=given, mode="r:") as tar:
                yield Archive(tar, path, most)
    except DataError as error:
        text = str(error)
        raise (error if text.startswith(str(path)) else DataError(f"{path}: {text}")) from None
    except (tarfile.TarError, EOFError, OSError, OverflowError, MemoryError) as error:
        raise DataError(f"{path}: not a .nemo file, or a damaged one: {one_line(error)}") from error


def load_tensors(file: IO[bytes], place: str) -> State:
    """Load a dictionary of tensors that torch saved, with ``weights_only``.

    Parameters
    ----------
    file : binary file
    place : str
        What it is called in messages.

    Raises
    ------
    DataError
        Damaged, compressed (torch never does), with anything in it but tensors, containers and numbers, or with
        tensors that are larger than what the file holds of them.
    """
    try:
        check_torch_file(file)
        file.seek(0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of old or odd pickles, which are refused if they cannot be read
            state = torch.load(file, map_location="cpu", weights_only=True)
        tensors = {name: tensor for name, tensor in state.items() if isinstance(tensor, torch.Tensor)}
        _check_storages(tensors)
        return tensors
    except BROKEN as error:
        text = one_line(error)
        raise DataError(f"{place}: its weights cannot be read, or are refused ({text}); fetch them again") from None


def _check_storages(tensors: State) -> None:
    """Raise ValueError for tensors that unfold to more than is stored of them: by strides of 0, or by sharing it.

    A matrix may stand twice, as embedding and as decoder.
    """
    if not all(isinstance(name, str) for name in tensors):
        raise ValueError("a tensor without a name")
    plain = [tensor for tensor in tensors.values() if tensor.layout is torch.strided]
    if any(tensor.device.type != "cpu" for tensor in plain):
        raise ValueError("a tensor without values")
    stored = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in plain}
    if any(tensor.nbytes > tensor.untyped_storage().nbytes() for tensor in plain):
        raise ValueError("a tensor is larger than what is stored of it")
    if sum(tensor.nbytes for tensor in plain) > MOST_SHARED * sum(stored.values()):
        raise ValueError("its tensors share what is stored so often that they are larger than the file")
