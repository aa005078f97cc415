# SPDX-License-Identifier: Apache-2.0
"""One shard's arrays: written narrow, block by block, into a temporary directory; read mapped."""

import errno
import io
import math
import secrets
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa

from megacell.core.errors import DataError
from megacell.core.files import TEMPORARY, flush_file, hash_file, move_into_place, remove_tree
from megacell.store.format.canonical import cell_hashes, narrow
from megacell.store.format.links import plain_size
from megacell.store.format.manifest import FileRecord, ObsColumn, ShardRecord
from megacell.store.format.obs import ObsWriter

FOLDER = "shards"
OBS = "obs.parquet"
SHARD_BYTES = 2 << 30  # at which a shard is full
WIDEN_ABOVE = 0.01  # share of counts over 254 from which a wider type is smaller than the overflow arrays
_HEADER = 128  # bytes of a .npy header whose length is filled in at the end
_HEADER_AT_MOST = 1 << 12  # of arrays that others wrote
_ALIGNED = 16  # bytes; compiled loops take values to lie at whole multiples of their size
_DEPTH = 2  # folders between a store's and its arrays: shards/NAME
_AT_ONCE = 1 << 20  # values a step when counts are widened


class ArrayWriter:
    """A one-dimensional .npy file that grows by appending; its header is completed by `close`."""

    def __init__(self, path: Path, dtype: str) -> None:
        self.path, self.dtype, self.length = path, np.dtype(dtype).newbyteorder("<"), 0
        self._file = open(path, "wb")  # noqa: SIM115 - closed by close()
        self._file.write(self._header())

    def append(self, values: np.ndarray[Any, Any]) -> None:
        """Add values; they are cast to the array's type, which must hold them."""
        self._file.write(np.ascontiguousarray(values, self.dtype).data)
        self.length += len(values)

    def close(self) -> FileRecord:
        """Complete the header, flush to disk and return the file's record."""
        self._file.seek(0)
        self._file.write(self._header())
        self._file.close()
        flush_file(self.path)
        return FileRecord.of(self.path, self.dtype.name, (self.length,))

    def abandon(self) -> None:
        """Close the file as it is."""
        self._file.close()

    def _header(self) -> bytes:
        text = f"{{'descr': '{self.dtype.str}', 'fortran_order': False, 'shape': ({self.length},), }}"
        magic = b"\x93NUMPY\x01\x00" + (_HEADER - 10).to_bytes(2, "little")
        return magic + text.ljust(_HEADER - 11).encode() + b"\n"


class ShardWriter:
    """Writes one shard. Blocks of rows are added in order; `finish` puts the shard in its place.

    Parameters
    ----------
    store : Path
    name : str
        The folder's name under ``shards/``.
    gene_hashes : uint64 [genes]
        XXH3-64 of each gene id of the union table.
    obs : sequence of ObsColumn
        The store's schema of the cells' metadata.
    fractional : bool
        True if counts need not be whole: they are kept as float32.
    """

    def __init__(
        self,
        store: Path,
        name: str,
        gene_hashes: np.ndarray[Any, Any],
        obs: Sequence[ObsColumn],
        *,
        fractional: bool,
    ) -> None:
        self._store, self.place = store, store / FOLDER / name
        # a name of its own: a process that outlives its killed conversion may still be writing the same shard
        self.folder = self.place.with_name(f"{name}-{secrets.token_hex(4)}{TEMPORARY}")
        self.folder.mkdir(parents=True)
        self.name, self.fractional, self._gene_hashes = name, fractional, gene_hashes
        dtypes = {
            "indptr": "int64",
            "indices": "uint16" if len(gene_hashes) <= 1 << 16 else "uint32",
            "counts": "float32" if fractional else "uint8",
            "cell_hash": "uint64",
            "panels": "uint32",
        }
        if not fractional:
            dtypes |= {"overflow_positions": "int64", "overflow_values": "uint32"}
        self._arrays = {key: ArrayWriter(self.folder / f"{key}.npy", dtype) for key, dtype in dtypes.items()}
        self._arrays["indptr"].append(np.zeros(1, np.int64))
        self._obs = ObsWriter(self.folder / OBS, obs)
        self._values, self._largest = 0, 0

    def add(
        self,
        indptr: np.ndarray[Any, Any],
        genes: np.ndarray[Any, Any],
        values: np.ndarray[Any, Any],
        source: int | np.ndarray[Any, Any],
    ) -> np.ndarray[Any, Any]:
        """Append canonical rows (see `canonical_rows`) of one source, or of one each; return their hashes."""
        arrays = self._arrays
        hashes: np.ndarray[Any, Any] = cell_hashes(indptr, genes, values, self._gene_hashes)
        arrays["indptr"].append(indptr[1:] + self._values)
        arrays["indices"].append(genes)
        if self.fractional:
            arrays["counts"].append(values)
        else:
            counts, positions, large = narrow(values)
            arrays["counts"].append(counts)
            arrays["overflow_positions"].append(positions + self._values)
            arrays["overflow_values"].append(large)
            self._largest = max(self._largest, int(large.max(initial=0)))
        arrays["cell_hash"].append(hashes)
        arrays["panels"].append(np.full(len(indptr) - 1, source, np.uint32))
        self._values += int(indptr[-1])
        return hashes

    def add_obs(self, obs: pd.DataFrame) -> None:
        """Append the metadata of the next rows: a tidy frame (`obs.tidy`)."""
        self._obs.add(obs)

    @property
    def cells(self) -> int:
        """Rows added so far."""
        return self._arrays["panels"].length

    def finish(self) -> ShardRecord:
        """Flush everything and rename the folder to its place."""
        files = {f"{key}.npy": array.close() for key, array in self._arrays.items()}
        if not self.fractional and self._arrays["overflow_values"].length > WIDEN_ABOVE * self._values:
            files["counts.npy"] = self._widen()
            for key in ("overflow_positions.npy", "overflow_values.npy"):
                del files[key]
                (self.folder / key).unlink()
        files[OBS] = self._obs.close()
        self._move(files)
        return ShardRecord(self.name, self.cells, self._values, dict(sorted(files.items())))

    def _move(self, files: dict[str, FileRecord]) -> None:
        try:
            move_into_place(self.folder, self.place)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
            # A process that outlived its killed conversion was faster: what it made of the same plan is the same.
            if {path.name: hash_file(path) for path in self.place.iterdir()} != {n: f.xxh3 for n, f in files.items()}:
                raise DataError(f"{self.place}: another process wrote it meanwhile; convert again") from None
            self._remove()

    def _remove(self) -> None:
        remove_tree(self._store, f"{FOLDER}/{self.folder.name}")

    def _widen(self) -> FileRecord:
        """Write the counts again as uint16 or uint32, step by step."""
        path = self.folder / "counts.npy"
        narrowed = np.load(path, mmap_mode="r")
        positions = np.load(self.folder / "overflow_positions.npy", mmap_mode="r")
        large = np.load(self.folder / "overflow_values.npy", mmap_mode="r")
        wide = ArrayWriter(self.folder / f"counts.npy{TEMPORARY}", "uint16" if self._largest < 1 << 16 else "uint32")
        for start in range(0, len(narrowed), _AT_ONCE):
            step = narrowed[start : start + _AT_ONCE].astype(wide.dtype)
            low, high = np.searchsorted(positions, [start, start + len(step)])
            step[positions[low:high] - start] = large[low:high]
            wide.append(step)
        record = wide.close()
        wide.path.replace(path)
        return record

    def abandon(self) -> None:
        """Remove what was written."""
        for abandon in (self._obs.abandon, *(array.abandon for array in self._arrays.values())):
            with suppress(OSError):  # closing writes what is buffered, and the disk may be full
                abandon()
        with suppress(OSError):
            self._remove()


def map_array(path: Path, record: FileRecord | None, dtypes: Sequence[str] = ()) -> np.ndarray[Any, Any]:
    """Map a one-dimensional .npy file read-only after a look at its size, which finds truncation before a page fault.

    Parameters
    ----------
    path : Path
        Two folders below the store's.
    record : FileRecord or None
        What the manifest says of it.
    dtypes : sequence of str
        NumPy's names of the types that it may have; compiled loops go by these. Any, if there are none.

    Raises
    ------
    DataError
        Missing, a link, of another size, type or shape than the manifest says.
    """
    if record is None:
        raise DataError(f"{path}: the manifest does not name it; run `megacell verify`")
    try:
        size = plain_size(path, _DEPTH)
        if size != record.bytes:
            raise DataError(f"{path}: {size} bytes, should be {record.bytes}; restore it or convert again")
        with pa.memory_map(str(path)) as file:  # unlike NumPy's maps it keeps no descriptor: stores have thousands
            content = file.read_buffer()
        header = io.BytesIO(content[:_HEADER_AT_MOST])
        np.lib.format.read_magic(header)
        shape, _, dtype = np.lib.format.read_array_header_1_0(header)
        array: np.ndarray[Any, Any] = np.frombuffer(content, dtype, math.prod(shape), header.tell()).reshape(shape)
    except (OSError, ValueError, TypeError, OverflowError, RecursionError, MemoryError) as error:
        fix = "restore it, convert again, or open the store anew if `compact --prune` removed it"
        raise DataError(f"{path}: cannot be read ({error}); {fix}") from None
    if array.dtype.name != record.dtype or array.shape != record.shape:
        raise DataError(f"{path}: {array.dtype.name} {array.shape}, not as the manifest says; run `megacell verify`")
    if array.ndim != 1 or header.tell() % _ALIGNED or not array.dtype.isnative:
        raise DataError(f"{path}: not laid out as a store's arrays are; convert again")
    if dtypes and array.dtype.name not in dtypes:
        raise DataError(f"{path}: holds {array.dtype.name}, not {' or '.join(dtypes)}; convert again")
    return array
