# SPDX-License-Identifier: Apache-2.0
"""Pickles that somebody made: what they could run, and what reading them could cost.

Geneformer's dictionaries, torch's weights, and the three files by which a checkpoint tells what is in it.
"""

import contextlib
import io
import os
import pickle
import struct
import zipfile
from collections import OrderedDict
from pathlib import Path

import models_made as made
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megacell.training.foreign.pickled import check_pickle
from megacell.training.foreign.torch_file import Part, check_torch_file

MARK = Path("/tmp/megacell-was-here")


class Danger:
    """Unpickled, it runs a command."""

    def __reduce__(self):
        return os.system, (f"touch {MARK}",)


def doubled(levels: int, use: bytes) -> bytes:
    """Return tuples of two of the one before, to be hashed: 2^levels hashes."""
    return (
        b"\x80\x02)q\x00"
        + b"".join(bytes([0x68, i - 1, 0x68, i - 1, 0x86, 0x71, i]) for i in range(1, levels))
        + use.replace(b"?", bytes([0x68, levels - 1]))
    )


def late(levels: int) -> bytes:
    """Return objects that get their state, two of the one before, once they were used: sizes as counted stay small."""
    pieces = [b"\x80\x02"]
    for i in range(levels):
        pieces.append(b"ctorch.distributed.checkpoint.metadata\nMetadataIndex\n)\x81q" + bytes([i]))
    for i in range(1, levels):
        pieces.append(
            b"h" + bytes([i]) + b"}X\x03\x00\x00\x00fqnh" + bytes([i - 1]) + b"h" + bytes([i - 1]) + b"\x86sb"
        )
    return b"".join(pieces) + b"."


DTYPE = b"\x80\x02cnumpy\ndtype\n(X\x02\x00\x00\x00f8tR"
BOMBS = {  # what: a pickle, and words of its refusal
    "a memo number of 300 million": (b"\x80\x02}r" + struct.pack("<I", 300_000_000) + b".", "a memo number of 300,0"),
    "a memo number in letters": (b"}p999999999\n.", "a memo number of 999,999,999"),
    "a terabyte of bytes": (b"\x80\x04\x8e" + struct.pack("<Q", 1 << 40), "a length in it leads behind its end"),
    "a terabyte of text": (b"\x80\x04\x8d" + struct.pack("<Q", 1 << 40), "a length in it leads behind its end"),
    "4 GB of a byte array": (b"\x80\x05\x96" + struct.pack("<Q", 4 << 30), "the opcode BYTEARRAY8"),
    "2 GB of a number": (b"\x80\x02\x8b" + struct.pack("<i", 2**31 - 1), "a length in it leads behind its end"),
    "a number of a million digits": (b"I" + b"9" * 1_000_000 + b"\n.", "more than 56 bits"),
    "a key of 2^40 values": (doubled(40, b"}?K\x01s."), "hold one another so often"),
    "keys of 2^40 values at once": (doubled(40, b"}(?K\x01u."), "hold one another so often"),
    "a set of 2^40 values": (doubled(40, b"\x8f(?\x90."), "hold one another so often"),
    "a frozen set of 2^40 values": (doubled(40, b"(?\x91."), "hold one another so often"),
    "a set made of a list of 2^40 values": (doubled(40, b"cbuiltins\nset\n]?a\x85R."), "hold one another so often"),
    "a million tuples in one another as a key": (b"\x80\x02})" + b"\x85" * 1_000_000 + b"K\x01s.", "so often"),
    "thousands of keys of thousands of values": (
        b"\x80\x02}(" + b"K\x01" * 9_000 + b"tq\x00(" + b"h\x00N" * 9_000 + b"u.",
        "hold one another so often",
    ),
    "a value that is taken off again": (doubled(40, b"}?K\x01s0N."), "hold one another so often"),
    "a value taken off": (b"\x80\x02K\x010N.", "the opcode POP"),
    "attributes of a class": (b"\x80\x02cnumpy\ndtype\n}X\x01\x00\x00\x00aK\x01sb.", "attributes to be set"),
    "attributes by slots": (DTYPE + b"N}X\x01\x00\x00\x00aK\x01s\x86b.", "attributes to be set"),
    "a state after use": (DTYPE + b"q\x00h\x00\x85h\x00}b.", "whose state is set after it was used"),
    "no end": (DTYPE + b"q\x00h\x00\x85", "ends too early"),
    "something outside of it": (b"Pabc\n.", "the opcode PERSID"),
    "an extension": (b"\x82\x01.", "the opcode EXT1"),
    "an instance": (b"(iposix\nsystem\n.", "the opcode INST"),
}  # fmt: skip


@pytest.fixture(scope="module")
def dictionaries(tmp_path_factory):
    """What came of each pickle, taken for a dictionary."""
    folder = tmp_path_factory.mktemp("dictionaries")
    cases = []
    for number, (name, (content, _)) in enumerate(BOMBS.items()):
        (folder / f"{number}.pkl").write_bytes(content)
        cases.append((name, "read_dictionary", [folder / f"{number}.pkl"]))
    (folder / "key.pkl").write_bytes(pickle.dumps({"a" * 1000: ("b",) * 1000}))
    (folder / "large.pkl").write_bytes(bytes(17 << 20))
    (folder / "token.pkl").write_bytes(pickle.dumps({"G": 2**40}))
    cases += [(name, "read_dictionary", [folder / f"{name}.pkl"]) for name in ("key", "large")]
    words = (
        "vocabulary",
        "import",
        "--tokens",
        folder / "token.pkl",
        "--medians",
        folder / "medians.pkl",
        "--out",
        folder / "v",
    )
    (folder / "medians.pkl").write_bytes(pickle.dumps({"G": 1.0}))
    return made.open_all([*cases, ("token", "megacell", list(map(str, words)))], folder)


@pytest.mark.parametrize("name", BOMBS)
def test_a_dictionary_is_refused(name, dictionaries):
    dictionaries[name].assert_refused(BOMBS[name][1], seconds=10, megabytes=300)


def test_what_a_dictionary_holds_is_told_in_short(dictionaries):
    dictionaries["key"].assert_refused(f"entry {'a' * 80!r}: a tuple is not a string to int")
    dictionaries["large"].assert_refused("a dictionary 16,777,216 at most")
    dictionaries["token"].assert_refused("a token that is none of 0 to 1,048,575")


def slotted() -> bytes:
    """Return a pickle that sets an attribute of one of torch's own classes, by a state of two parts."""
    text = b"ctorch.distributed.checkpoint.metadata\nMetadata\n"
    return b"\x80\x02" + text + b"(N}X\x04\x00\x00\x00evilX\x01\x00\x00\x00xstb."


def zipped(parts: dict[str, bytes]) -> bytes:
    with zipfile.ZipFile(out := io.BytesIO(), "w") as file:
        for name, content in parts.items():
            file.writestr(f"archive/{name}", content)
    return out.getvalue()


def saved(state) -> bytes:
    torch.save(state, out := io.BytesIO())
    return out.getvalue()


def longer_than_stored() -> bytes:
    """Return weights whose pickle says that more of them is stored than there is."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(saved({"a": torch.arange(4.0)}))) as old, zipfile.ZipFile(out, "w") as new:
        for name in old.namelist():
            content = old.read(name)
            if name.endswith("data.pkl"):
                content = content.replace(b"K\x04tq", b"M\x00\x40tq").replace(b"K\x04\x85", b"M\x00\x40\x85")
            new.writestr(name, content)
    return out.getvalue()


def elsewhere(run: Path) -> bytes:
    return (made.checkpoint_of(run) / ".metadata").read_bytes().replace(b"__0_0.distcp", b"../../x.yaml")


def beyond(run: Path) -> bytes:
    content = (made.checkpoint_of(run) / "__0_0.distcp").read_bytes()
    return content[:5000]


def bombed(run: Path) -> bytes:
    """Return a part of a checkpoint in which the first tensor's pickle is a bomb of the same length."""
    content = bytearray((made.checkpoint_of(run) / "__0_0.distcp").read_bytes())
    at = content.index(b"\x80\x02ctorch._utils\n_rebuild_tensor_v2")
    content[at : at + 40] = doubled(4, b"").ljust(32, b"N")[:32] + b"}r\xff\xff\xff\x7f."[:8]
    return bytes(content)


EXEC = pickle.dumps(Danger())
CHECKPOINTS = {  # what: the file, its content, and words of the refusal
    ".metadata that runs a command": (".metadata", EXEC, "posix.system"),
    ".metadata by a dotted name": (
        ".metadata",
        b"\x80\x04\x8c\x05torch\x8c\x17serialization.os.system\x93.",
        "torch.serialization.os.system",
    ),
    ".metadata that sets attributes": (".metadata", slotted(), "attributes to be set"),
    ".metadata whose objects get their state late": (".metadata", late(30), "whose state is set after it was used"),
    ".metadata of a terabyte": (".metadata", BOMBS["a terabyte of bytes"][0], "a length in it leads behind its end"),
    ".metadata of 2^40 values": (".metadata", BOMBS["a key of 2^40 values"][0], "so often"),
    ".metadata with a memo of 300 million": (".metadata", BOMBS["a memo number of 300 million"][0], "a memo number"),
    ".metadata that is none": (".metadata", b"garbage", "cannot be read"),
    ".metadata that is a text": (".metadata", pickle.dumps("x"), "cannot be read"),
    ".metadata that names a file elsewhere": (".metadata", elsewhere, "'../../x.yaml'"),
    "common.pt that runs a command": ("common.pt", saved({"a": Danger()}), "posix.system"),
    "common.pt that is a plain pickle": ("common.pt", EXEC, "cannot be read"),
    "common.pt of 2^40 values": ("common.pt", zipped({"data.pkl": BOMBS["a key of 2^40 values"][0]}), "so often"),
    "common.pt that is none": ("common.pt", b"garbage", "cannot be read"),
    "weights that are too short": ("__0_0.distcp", beyond, "no bytes "),
    "weights of a memo of two thousand million": ("__0_0.distcp", bombed, "cannot be read"),
}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """What came of each checkpoint, sizes and hashes right."""
    folder = tmp_path_factory.mktemp("checkpoints")
    cases = []
    for number, (name, (file, content, _)) in enumerate(CHECKPOINTS.items()):
        run = made.copy_run(folder / str(number))
        made.replace_file(run, file, content(run) if callable(content) else content)
        cases.append((name, "open_model", [made.checkpoint_of(run)]))
    return made.open_all(cases, folder)


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_a_checkpoint_is_refused(name, checkpoints):
    checkpoints[name].assert_refused(CHECKPOINTS[name][2], megabytes=600)
    assert not MARK.exists()


WEIGHTS = {
    "that run a command": (saved({"a": Danger()}), "are refused"),
    "that are a plain pickle": (EXEC, "in neither of torch's formats"),
    "of 2^40 values": (zipped({"data.pkl": BOMBS["a key of 2^40 values"][0], "version": b"3"}), "so often"),
    "of 2^40 values in torch's old format": (
        pickle.dumps(0x1950A86A20F9469CFC6C, 2) + pickle.dumps(1001, 2) + BOMBS["a key of 2^40 values"][0],
        "so often",
    ),
    "with a memo of 300 million": (
        zipped({"data.pkl": BOMBS["a memo number of 300 million"][0], "version": b"3"}),
        "a memo number",
    ),
    "longer than what is stored of them": (longer_than_stored(), "are refused"),
}


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """What came of each file of weights, in a .nemo file."""
    folder = tmp_path_factory.mktemp("weights")
    cases = []
    for number, (name, (content, _)) in enumerate(WEIGHTS.items()):
        path = made.write_nemo(folder / f"{number}.nemo", {**made.members(), made.WEIGHTS: content})
        cases.append((name, "open_model", [path]))
    return made.open_all(cases, folder)


@pytest.mark.parametrize("name", WEIGHTS)
def test_weights_are_refused(name, weights):
    weights[name].assert_refused(WEIGHTS[name][1], seconds=10, megabytes=400)
    assert not MARK.exists()


# -- what is no bomb passes

BROKEN = (EOFError, AttributeError, IndexError, KeyError, TypeError, ValueError, OverflowError)  # no MemoryError
PLAIN = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**54), 2**54)
    | st.floats()
    | st.text(max_size=5)
    | st.binary(max_size=300),
    lambda parts: (
        st.lists(parts, max_size=4)
        | st.dictionaries(st.text(max_size=3), parts, max_size=4)
        | st.lists(parts, max_size=4).map(tuple)
        | st.frozensets(st.text(max_size=3), max_size=3)
    ),
    max_leaves=20,
)


@given(PLAIN, st.integers(0, 5))
def test_pythons_own_pickles_pass_to_their_end(value, protocol):
    content = pickle.dumps([value, value], protocol)
    assert check_pickle(content + b"more") == len(content)


@given(st.binary(max_size=60))
def test_any_bytes_end_in_one_of_three_ways(content):
    with contextlib.suppress(ValueError, pickle.UnpicklingError):
        assert 0 < check_pickle(content) <= len(content)


@given(PLAIN, st.integers(0, 5), st.data())
def test_whatever_passes_is_unpickled_in_little_memory(value, protocol, data):
    """Bytes of a good pickle changed: what passes, a restricted unpickler reads without harm."""

    class Nothing(pickle.Unpickler):
        def find_class(self, module, name):
            raise pickle.UnpicklingError(name)

    content = bytearray(pickle.dumps(value, protocol))
    for _ in range(3):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    try:
        check_pickle(bytes(content))
    except (ValueError, pickle.UnpicklingError):
        return
    with contextlib.suppress(pickle.UnpicklingError, *BROKEN):
        Nothing(io.BytesIO(content)).load()


@pytest.mark.parametrize("old", [False, True], ids=["zip", "before 1.6"])
def test_what_torch_writes_passes(old):
    layer = torch.nn.Linear(3, 3)
    state = {
        "state": layer.state_dict(),
        "parameter": torch.nn.Parameter(torch.ones(2)),
        "bfloat16": torch.ones(2).bfloat16(),
        "transposed": torch.arange(6.0).view(2, 3).T,
        "ordered": OrderedDict(a=1, b=(2, "c")),
        "number": np.float64(1.5),
    }
    torch.save(state, out := io.BytesIO(), _use_new_zipfile_serialization=not old)
    check_torch_file(out)


def test_a_part_of_a_file_is_read_as_if_it_were_one(tmp_path):
    content = saved({"a": torch.ones(3)})
    (tmp_path / "file").write_bytes(b"before" + content + b"after")
    with open(tmp_path / "file", "rb") as file:
        check_torch_file(Part(file, 6, len(content)))
        assert Part(file, 6, len(content)).read() == content
        for offset, length in ((-1, 5), (0, 10**9), (5, -1)):
            with pytest.raises(ValueError, match="no bytes"):
                Part(file, offset, length)
