# SPDX-License-Identifier: Apache-2.0
"""Ways to damage a file of cells: its bytes, wherever they lie, and the structure of an AnnData file by h5py."""

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import h5py
import numpy as np

Random = np.random.Generator
Damage = Callable[[bytearray, Random], bytearray]


def _place(content: bytearray, random: Random, size: int) -> tuple[int, int]:
    """Choose a stretch of a file: most of the structure of a small HDF5 file lies at its beginning."""
    reach = len(content) if random.random() < 0.6 else min(len(content), 4096)
    start = int(random.integers(max(1, reach - size)))
    return start, min(start + size, len(content))


def flip_bit(content: bytearray, random: Random) -> bytearray:
    start, _ = _place(content, random, 1)
    content[start] ^= 1 << int(random.integers(8))
    return content


def flip_bytes(content: bytearray, random: Random) -> bytearray:
    for _ in range(int(random.integers(2, 9))):
        start, _ = _place(content, random, 1)
        content[start] ^= int(random.integers(1, 256))
    return content


def zero_block(content: bytearray, random: Random) -> bytearray:
    start, stop = _place(content, random, int(random.choice([8, 64, 512, 4096])))
    content[start:stop] = bytes(stop - start)
    return content


def fill_block(content: bytearray, random: Random) -> bytearray:
    start, stop = _place(content, random, int(random.choice([4, 8, 64, 512])))
    content[start:stop] = b"\xff" * (stop - start)
    return content


def swap_blocks(content: bytearray, random: Random) -> bytearray:
    size = int(random.choice([8, 64, 512]))
    (a, b), (c, d) = _place(content, random, size), _place(content, random, size)
    content[a:b], content[c:d] = content[c : c + b - a], content[a : a + d - c]
    return content


def truncate(content: bytearray, random: Random) -> bytearray:
    return content[: int(len(content) * random.random())]


def cut_out(content: bytearray, random: Random) -> bytearray:
    start, stop = _place(content, random, int(random.choice([1, 8, 512])))
    return content[:start] + content[stop:]


OF_BYTES: dict[str, Damage] = {
    "a flipped bit": flip_bit,
    "flipped bytes": flip_bytes,
    "a zeroed block": zero_block,
    "a block of ones": fill_block,
    "swapped blocks": swap_blocks,
    "a file cut short": truncate,
    "bytes cut out": cut_out,
}


# -- the structure of an AnnData file

Group = h5py.Group
Structural = Callable[[h5py.File, Group, Random], object]


def _put(group: Group, name: str, values: object, **options: object) -> None:
    del group[name]
    group.create_dataset(name, data=values, **options)


def _changed(name: str, change: Callable[[np.ndarray, Random], np.ndarray]) -> Structural:
    """Replace one array of a sparse matrix."""
    return lambda _, group, random: _put(group, name, change(group[name][:], random))


def _with(values: np.ndarray, random: Random, value: float) -> np.ndarray:
    """Put a value somewhere."""
    values = values.copy()
    values[random.integers(len(values))] = value
    return values


def _in_rows(change: Callable[[np.ndarray], np.ndarray]) -> Structural:
    """Put the stored values of each row into another order."""

    def spoil(_: h5py.File, group: Group, __: Random) -> None:
        indptr = group["indptr"][:]
        order = np.concatenate([a + change(np.arange(b - a)) for a, b in pairwise(indptr)])
        for name in ("indices", "data"):
            _put(group, name, group[name][:][order.astype(int)])

    return spoil


def _repeat_an_index(_: h5py.File, group: Group, random: Random) -> None:
    indices, row = group["indices"][:], np.flatnonzero(np.diff(group["indptr"][:]) > 1)
    start = int(group["indptr"][int(random.choice(row))])
    indices[start + 1] = indices[start]
    _put(group, "indices", indices)


def _attribute(name: str, value: object) -> Structural:
    return lambda _, group, __: group.attrs.__setitem__(name, value)


def _without(path: str) -> Structural:
    return lambda file, _, __: file.__delitem__(path)


def _linked(path: str, link: object) -> Structural:
    def spoil(file: h5py.File, _: Group, __: Random) -> None:
        if path in file:
            del file[path]
        file[path] = file[link] if isinstance(link, str) else link

    return spoil


def _enlarged(path: str, length: int) -> Structural:
    """Say that an array is far longer than what is stored of it."""

    def spoil(file: h5py.File, _: Group, __: Random) -> None:
        node = file[path]
        values, attributes, dtype = node[()], dict(node.attrs), node.dtype
        del file[path]
        shape = (length, *values.shape[1:])
        made = file.create_dataset(path, shape, dtype, maxshape=shape, chunks=values.shape)
        made[: len(values)] = values
        made.attrs.update(attributes)

    return spoil


def _replaced(path: str, change: Callable[[np.ndarray], object]) -> Structural:
    def spoil(file: h5py.File, _: Group, __: Random) -> None:
        attributes, values = dict(file[path].attrs), file[path][()]
        _put(file, path, change(values))
        file[path].attrs.update(attributes)

    return spoil


def _outside(file: h5py.File, group: Group, _: Random) -> None:
    """Let the values lie in a file that is not there."""
    shape, dtype = group["data"].shape, group["data"].dtype
    del group["data"]
    group.create_dataset("data", shape, dtype, external=[("gone.raw", 0, h5py.h5f.UNLIMITED)])


def _virtual(file: h5py.File, group: Group, _: Random) -> None:
    layout = h5py.VirtualLayout(group["data"].shape, group["data"].dtype)
    layout[:] = h5py.VirtualSource("gone.h5", "data", group["data"].shape)
    del group["data"]
    group.create_virtual_dataset("data", layout)


NEXT = 2**40
OF_SPARSE: dict[str, Structural] = {
    "an index too large": _changed("indices", lambda v, r: _with(v, r, 10_000)),
    "an index that is huge": _changed("indices", lambda v, r: _with(v.astype(np.int64), r, 2**62)),
    "a negative index": _changed("indices", lambda v, r: _with(v, r, -1)),
    "indices as fractions": _changed("indices", lambda v, _: v + 0.5),
    "indices of another length": _changed("indices", lambda v, _: v[:-1]),
    "an index twice": _repeat_an_index,
    "unsorted indices": _in_rows(lambda own: own[::-1]),
    "indptr not monotone": _changed("indptr", lambda v, r: _with(v, r, v[-1] + 1)),
    "indptr that falls": _changed("indptr", lambda v, _: v[::-1]),
    "indptr from 3": _changed("indptr", lambda v, _: np.maximum(v, 3)),
    "indptr that ends early": _changed("indptr", lambda v, _: np.minimum(v, v[-1] - 2)),
    "indptr that ends late": _changed("indptr", lambda v, _: np.append(v[:-1], v[-1] + 9)),
    "indptr too short": _changed("indptr", lambda v, _: v[:-1]),
    "indptr too long": _changed("indptr", lambda v, _: np.append(v, v[-1])),
    "indptr of zeros": _changed("indptr", lambda v, _: np.zeros_like(v)),
    "a negative indptr": _changed("indptr", lambda v, r: _with(v, r, -4)),
    "a huge indptr": _changed("indptr", lambda v, r: _with(v.astype(np.uint64), r, 2**63)),
    "indptr of fractions": _changed("indptr", lambda v, _: v.astype(np.float64)),
    "indptr of two dimensions": _changed("indptr", lambda v, _: v[None]),
    "indptr as text": _changed("indptr", lambda v, _: np.array([str(x) for x in v], object)),
    "values of another length": _changed("data", lambda v, _: v[:-3]),
    "values as text": _changed("data", lambda v, _: np.array([str(x) for x in v], object)),
    "complex values": _changed("data", lambda v, _: v.astype(np.complex64)),
    "half precision": _changed("data", lambda v, _: v.astype(np.float16)),
    "values of two dimensions": _changed("data", lambda v, _: v[:, None]),
    "a value NaN": _changed("data", lambda v, r: _with(v.astype(np.float32), r, np.nan)),
    "a value infinite": _changed("data", lambda v, r: _with(v.astype(np.float32), r, np.inf)),
    "a value minus infinite": _changed("data", lambda v, r: _with(v.astype(np.float64), r, -np.inf)),
    "a negative value": _changed("data", lambda v, r: _with(v.astype(np.int64), r, -1)),
    "a value over any count": _changed("data", lambda v, r: _with(v.astype(np.float64), r, 1e30)),
    "a value of half": _changed("data", lambda v, r: _with(v.astype(np.float64), r, 0.5)),
    "no values": _without("X/data"),
    "no indices": _without("X/indices"),
    "no indptr": _without("X/indptr"),
    "a null space for values": lambda _, group, __: _put(group, "data", h5py.Empty("f4")),
    "no encoding": lambda _, group, __: group.attrs.__delitem__("encoding-type"),
    "the other encoding": lambda _, group, __: group.attrs.__setitem__(
        "encoding-type", "csr_matrix" if group.attrs["encoding-type"] == "csc_matrix" else "csc_matrix"
    ),
    "an unknown encoding": _attribute("encoding-type", "coo_matrix"),
    "an encoding that is a number": _attribute("encoding-type", 7),
    "encodings by the dozen": _attribute("encoding-type", np.arange(12)),
    "an unknown version": _attribute("encoding-version", "9.9.9"),
    "no shape": lambda _, group, __: group.attrs.__delitem__("shape"),
    "a shape turned round": lambda _, group, __: group.attrs.__setitem__("shape", group.attrs["shape"][::-1]),
    "a huge shape": _attribute("shape", [NEXT, 120]),
    "a negative shape": _attribute("shape", [-40, 120]),
    "a shape of three": _attribute("shape", [40, 120, 1]),
    "a shape of one": _attribute("shape", 40),
    "a shape of fractions": _attribute("shape", [40.5, 120.0]),
    "a shape of text": _attribute("shape", "forty"),
    "far more values": _enlarged("X/data", NEXT),
    "far more indices": _enlarged("X/indices", NEXT),
    "far more pointers": _enlarged("X/indptr", NEXT),
    "values in a file that is gone": _outside,
    "values of a virtual file that is gone": _virtual,
    "values that link to themselves": _linked("X/data", h5py.SoftLink("/X/data")),
    "values in another file": _linked("X/data", h5py.ExternalLink("gone.h5", "/X/data")),
}
OF_ANY: dict[str, Structural] = {
    "no X": _without("X"),
    "no obs": _without("obs"),
    "no var": _without("var"),
    "no names of cells": _without("obs/_index"),
    "no names of genes": _without("var/_index"),
    "X is the whole file": _linked("X", "/"),
    "X is obs": _linked("X", "obs"),
    "X links to itself": _linked("X", h5py.SoftLink("/X")),
    "X in another file": _linked("X", h5py.ExternalLink("gone.h5", "/X")),
    "raw is the whole file": _linked("raw", "/"),
    "layers are the whole file": _linked("layers", "/"),
    "obs within obs": _linked("obs/obs", "obs"),
    "obs is var": _linked("obs", "var"),
    "names that link to themselves": _linked("obs/_index", h5py.SoftLink("/obs/_index")),
    "X of text": lambda file, *_: (file.__delitem__("X"), file.__setitem__("X", "counts")),
    "X of one dimension": lambda file, *_: (file.__delitem__("X"), file.__setitem__("X", np.ones(40))),
    "X of three dimensions": lambda file, *_: (file.__delitem__("X"), file.__setitem__("X", np.ones((40, 120, 2)))),
    "X of records": lambda file, *_: (file.__delitem__("X"), file.__setitem__("X", np.zeros((40, 120), "i4,f4"))),
    "X of references": lambda file, *_: (
        file.__delitem__("X"),
        file.create_dataset("X", (40, 120), h5py.ref_dtype),
    ),
    "X without room": lambda file, *_: (file.__delitem__("X"), file.create_dataset("X", (NEXT, 120), "f4")),
    "a cell too many": _replaced("obs/_index", lambda v: np.append(v, v[-1])),
    "a cell too few": _replaced("obs/_index", lambda v: v[:-1]),
    "no cells": _replaced("obs/_index", lambda v: v[:0]),
    "a gene too many": _replaced("var/_index", lambda v: np.append(v, b"ENSG00000099999")),
    "a gene too few": _replaced("var/_index", lambda v: v[:-1]),
    "cells numbered": _replaced("obs/_index", lambda v: np.arange(len(v))),
    "cells named alike": _replaced("obs/_index", lambda v: np.full_like(v, b"cell")),
    "genes named alike": _replaced("var/_index", lambda v: np.array([*v[:-2], v[0], v[0]], object)),
    "genes without names": _replaced("var/_index", lambda v: np.array([*v[:-2], b"", b" "], object)),
    "genes numbered": _replaced("var/_index", lambda v: np.arange(len(v))),
    "names of two dimensions": _replaced("obs/_index", lambda v: v[:, None]),
    "names that are no UTF-8": _replaced("obs/_index", lambda v: np.array([b"\xff\xfe", *v[1:]], object)),
    "far more cells": _enlarged("obs/_index", NEXT),
    "far more genes": _enlarged("var/_index", 2**28),
    "far more of a column": _enlarged("obs/depth", NEXT),
    "a column of another length": _replaced("obs/depth", lambda v: v[:-5]),
    "a column that is gone": _without("obs/depth"),
    "a column of two dimensions": _replaced("obs/depth", lambda v: np.stack([v, v], 1)),
    "a column of records": _replaced("obs/depth", lambda v: np.zeros(len(v), "i4,f4")),
    "a code too large": _replaced("obs/kind/codes", lambda v: np.where(np.arange(len(v)) == 5, 99, v).astype(v.dtype)),
    "a code too small": _replaced("obs/kind/codes", lambda v: np.where(np.arange(len(v)) == 5, -7, v).astype(v.dtype)),
    "codes of fractions": _replaced("obs/kind/codes", lambda v: v + 0.5),
    "codes of another length": _replaced("obs/kind/codes", lambda v: v[1:]),
    "far more codes": _enlarged("obs/kind/codes", NEXT),
    "no codes": _without("obs/kind/codes"),
    "no categories": _without("obs/kind/categories"),
    "a category twice": _replaced("obs/kind/categories", lambda v: np.array([v[0]] * len(v), object)),
    "fewer categories": _replaced("obs/kind/categories", lambda v: v[:1]),
    "far more categories": _enlarged("obs/kind/categories", NEXT),
    "no encoding of obs": lambda file, *_: file["obs"].attrs.__delitem__("encoding-type"),
    "no encoding of a column": lambda file, *_: file["obs/kind"].attrs.__delitem__("encoding-type"),
    "obs of no version": lambda file, *_: file["obs"].attrs.__setitem__("encoding-version", "0.0.0"),
    "another index": lambda file, *_: file["obs"].attrs.__setitem__("_index", "absent"),
    "an index that leads out": lambda file, *_: file["obs"].attrs.__setitem__("_index", "/X"),
    "a column too many": lambda file, *_: file["obs"].attrs.__setitem__("column-order", ["depth", "absent"]),
    "columns of numbers": lambda file, *_: file["obs"].attrs.__setitem__("column-order", [1, 2]),
    "no order of columns": lambda file, *_: file["obs"].attrs.__delitem__("column-order"),
    "a text that is no UTF-8": _replaced("uns/organism", lambda _: np.bytes_(b"\xff\xfe")),
    "an array for the organism": _replaced("uns/organism", lambda _: np.arange(5)),
}


def structural(path: Path, name: str, random: Random) -> None:
    """Damage the structure of an AnnData file."""
    with h5py.File(path, "r+") as file:
        ({**OF_ANY, **OF_SPARSE}[name])(file, file["X"], random)
