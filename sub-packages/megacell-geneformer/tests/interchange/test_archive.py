# SPDX-License-Identifier: Apache-2.0
"""A .nemo file from anybody: damaged, foreign or malicious, it is refused in one line; nothing is written or run."""

import contextlib
import io
import os
import pickle
import tarfile
import tempfile
import zipfile

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from megacell.core.cli import main as cli
from megacell.core.errors import DataError, MegacellError
from megacell.geneformer.interchange import hugging_face
from megacell.geneformer.interchange.open import check_fit, open_model
from megacell.geneformer.model.archive import GeneformerArchive
from megacell.geneformer.model.geneformer_model import GeneformerModel
from megacell.training.interchange import nemo

CONFIG, WEIGHTS = "./model_config.yaml", "./model_weights.ckpt"
RUN = "/tmp/megacell-was-here"


@pytest.fixture(scope="module")
def vocabulary(vocabulary_for):
    return vocabulary_for(genes=60)


@pytest.fixture(scope="module")
def whole(model_for, vocabulary, tmp_path_factory):
    path = tmp_path_factory.mktemp("whole") / "model.nemo"
    nemo.save(model_for(vocabulary, provenance={"step": 3}, layers=1), path)
    return path


@pytest.fixture
def members(whole):
    """The archive's members by name."""
    with tarfile.open(whole) as tar:
        return {m.name: (m, tar.extractfile(m).read() if m.isfile() else b"") for m in tar.getmembers()}


def write(path, members, mode="w:"):
    with tarfile.open(path, mode) as tar:
        for member, content in members.values():
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


def file(name, content=b"", **attributes):
    member = tarfile.TarInfo(name)
    for attribute, value in attributes.items():
        setattr(member, attribute, value)
    return member, content


class Danger:
    def __reduce__(self):
        return os.system, (f"touch {RUN}",)


def saved(state):
    torch.save(state, buffer := io.BytesIO())
    return buffer.getvalue()


def tensors(members):
    return torch.load(io.BytesIO(members[WEIGHTS][1]), weights_only=True)


def new_weights(change):
    def rewrite(members):
        state = tensors(members)
        members[WEIGHTS] = file(WEIGHTS, saved(change(state) or state))

    return rewrite


def compressed(members):
    """A zip bomb: the same parts, one of them grown a thousandfold, deflated."""
    out = io.BytesIO()
    with (
        zipfile.ZipFile(io.BytesIO(members[WEIGHTS][1])) as old,
        zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as new,
    ):
        for entry in old.infolist():
            new.writestr(entry.filename, bytes(1 << 24) if entry.filename.endswith("/data/0") else old.read(entry))
    members[WEIGHTS] = file(WEIGHTS, out.getvalue())


def overlapping(members):
    """A zip whose directory lists one part many times."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as new:
        new.writestr("a/data.pkl", bytes(1 << 16))
        entry = new.filelist[0]
        new.filelist += [entry] * 50
    members[WEIGHTS] = file(WEIGHTS, out.getvalue())


def new_config(old, new):
    def rewrite(members):
        text = members[CONFIG][1].decode()
        assert old in text
        members[CONFIG] = file(CONFIG, text.replace(old, new).encode())

    return rewrite


def added(name, content=b"", **attributes):
    return lambda members: members.update({name: file(name, content, **attributes)})


def without(name):
    return lambda members: members.pop(name)


def broken(name, content):
    return lambda members: members.update({name: file(name, content)})


def other_vocabulary(members):
    new_config("vocabulary: ", "vocabulary: 0")(members)


BAD = {
    "a path that leads up": (added("../up", b"x"), "'../up', which lies outside"),
    "a path that leads up later": (added("a/../../up", b"x"), "lies outside"),
    "an absolute path": (added("/tmp/megacell-up", b"x"), "lies outside"),
    "a symbolic link": (added("./a", type=tarfile.SYMTYPE, linkname="/etc/passwd"), "'a', which is neither file nor"),
    "a hard link": (added("./a", type=tarfile.LNKTYPE, linkname="/etc/passwd"), "'a', which is neither file nor"),
    "a weights file that is a link": (
        added(WEIGHTS, type=tarfile.SYMTYPE, linkname="/dev/zero"),
        "'model_weights.ckpt', which is neither",
    ),
    "a device": (added("./a", type=tarfile.CHRTYPE), "which is neither file nor"),
    "a pipe": (added("./a", type=tarfile.FIFOTYPE), "which is neither file nor"),
    "a file twice": (added("model_config.yaml", b"network: {}"), "stands in it twice"),
    "two thousand files": (
        lambda members: [added(f"./{i}")(members) for i in range(2000)],
        "is more than 1,000 files",
    ),
    "a configuration larger than any": (broken(CONFIG, b"#" * (2 << 20)), "which it cannot need"),
    "no configuration": (without(CONFIG), "without model_config.yaml"),
    "no weights": (without(WEIGHTS), "without model_weights.ckpt"),
    "no vocabulary": (
        lambda m: [m.pop(name) for name in list(m) if "vocabulary" in name],
        "without vocabulary",
    ),
    "a configuration that is no YAML": (broken(CONFIG, b"a: [1"), "model_config.yaml cannot be read"),
    "a configuration of Python objects": (
        broken(CONFIG, f"network: !!python/object/apply:os.system ['touch {RUN}']".encode()),
        "model_config.yaml cannot be read",
    ),
    "a configuration that is a list": (broken(CONFIG, b"- 1"), "holds no options"),
    "a configuration without a network": (broken(CONFIG, b"a: 1"), "describes no network"),
    "a layer more in the configuration": (new_config("layers: 1", "layers: 2"), "missing"),
    "another width in the configuration": (new_config("ffn: 64", "ffn: 48"), r"is \(64, 32\), .*say \(48, 32\)"),
    "another vocabulary's hash": (other_vocabulary, "another vocabulary"),
    "a vocabulary that was changed": (
        broken("./vocabulary/vocabulary.json", b"{}"),
        "vocabulary: not a vocabulary",
    ),
    "a pickle in place of weights": (broken(WEIGHTS, pickle.dumps(Danger())), "are refused"),
    "a pickle that runs a command": (broken(WEIGHTS, saved({"a": Danger()})), "are refused"),
    "weights that are a list": (broken(WEIGHTS, saved([torch.ones(3)])), "cannot be read"),
    "weights cut short": (lambda m: broken(WEIGHTS, m[WEIGHTS][1][:3000])(m), "cannot be read"),
    "weights with a byte changed in their directory": (
        lambda m: broken(WEIGHTS, m[WEIGHTS][1][:-30] + b"\xff" * 30)(m),
        "cannot be read",
    ),
    "a zip bomb": (compressed, "it is compressed"),
    "a zip whose parts overlap": (overlapping, "its parts overlap"),
    "a tensor of another shape": (
        new_weights(lambda s: s.update({"bert.lm_head.dense.bias": torch.zeros(3)})),
        r"lm_head.dense.bias is \(3,\)",
    ),
    "a tensor that unfolds to a terabyte": (
        new_weights(lambda s: s.update({"bert.lm_head.dense.bias": torch.zeros(1).expand(1 << 38)})),
        "larger than what is stored of it",
    ),
    "a tensor too few": (new_weights(lambda s: {name: s[name] for name in list(s)[1:]}), "missing"),
    "a tensor too many": (new_weights(lambda s: s.update({"bert.more": torch.zeros(3)})), "unknown"),
    "whole numbers for weights": (
        new_weights(lambda s: s.update({"bert.lm_head.dense.bias": torch.zeros(32, dtype=torch.int64)})),
        "holds int64",
    ),
    "weights of 8 bits": (
        new_weights(lambda s: s.update({"bert.lm_head.dense.bias": torch.zeros(32).to(torch.float8_e4m3fn)})),
        "holds float8_e4m3fn.*16 or 32 bits",
    ),
    "a sparse tensor": (
        new_weights(lambda s: s.update({"bert.lm_head.dense.bias": torch.zeros(32).to_sparse()})),
        "where weights should be|cannot be read",
    ),
    "NaN": (
        new_weights(lambda s: s.update({"bert.lm_head.dense.bias": torch.full((32,), np.nan)})),
        "NaN",
    ),
}


@pytest.fixture
def places(tmp_path, monkeypatch):
    """Temporary files in a folder of their own."""
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    return tmp_path


def refused(path, words):
    """Refused by the command, in one line that names the file; nothing is left behind."""
    before = sorted(p for p in path.parent.rglob("*"))
    with pytest.raises(MegacellError, match=words) as error:
        open_model(path)
    assert str(error.value).startswith(str(path))
    assert "\n" not in str(error.value)
    assert sorted(p for p in path.parent.rglob("*")) == before
    assert not os.path.exists(RUN)
    assert not os.path.exists("/tmp/megacell-up")


@pytest.mark.parametrize("mode", ["w:", "w:gz"], ids=["plain", "compressed"])
@pytest.mark.parametrize(("change", "words"), BAD.values(), ids=BAD.keys())
def test_it_is_refused_with_its_reason(change, words, mode, members, places):
    change(members)
    write(places / "bad.nemo", members, mode)
    refused(places / "bad.nemo", words)


def test_neither_are_nemos_own_ways_of_restoring_fooled(members, places):
    added("./a", type=tarfile.SYMTYPE, linkname="/etc/passwd")(members)
    write(places / "bad.nemo", members)
    for restore in (GeneformerModel.restore_from, lambda path: GeneformerArchive._unpack_nemo_file(path, str(places))):
        with pytest.raises(DataError, match="neither file nor folder"):
            restore(str(places / "bad.nemo"))
    assert sorted(p.name for p in places.iterdir()) == ["bad.nemo", "temporary"]


def test_the_command_says_it_in_one_line_and_ends_with_1(members, places, capsys):
    broken(WEIGHTS, saved({"a": Danger()}))(members)
    write(places / "bad.nemo", members)
    assert cli.main(["import", str(places / "bad.nemo"), "--out", str(places / "out.nemo")]) == 1
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1
    assert str(places / "bad.nemo") in said[0]
    assert not os.path.exists(RUN)
    assert sorted(p.name for p in places.iterdir()) == ["bad.nemo", "temporary"]


def test_every_cut_of_an_archive_is_refused(whole, places):
    content = whole.read_bytes()
    for size in (0, 1, 100, 511, 512, 600, 1500, len(content) // 2, len(content) * 9 // 10):
        (places / "cut.nemo").write_bytes(content[:size])
        refused(places / "cut.nemo", "cut.nemo")


@pytest.mark.parametrize("seed", range(20))
def test_a_damaged_archive_is_refused_or_is_the_same_model(seed, whole, places):
    """Bytes changed anywhere: either the damage is seen, or it lay where nothing is read (padding, dates)."""
    draw = np.random.default_rng(seed)
    content = bytearray(whole.read_bytes())
    for at in draw.integers(0, 3000, 4):  # headers and configuration: in weights a changed bit is another weight
        content[at] = draw.integers(256)
    (places / "bad.nemo").write_bytes(content)
    with contextlib.suppress(MegacellError):
        model, same = open_model(places / "bad.nemo").weights(), open_model(whole).weights()
        assert all(torch.equal(tensor, same[name]) for name, tensor in model.items())
        return
    refused(places / "bad.nemo", "bad.nemo")


def test_what_unpacks_to_more_than_it_can_hold_is_refused(places):
    import gzip

    with gzip.open(places / "bad.nemo", "wb") as out:  # 200 MB of zeros behind a header in 0.2 MB
        member = tarfile.TarInfo("./model_weights.ckpt")
        member.size = 200 << 20
        out.write(member.tobuf())
        for _ in range(200):
            out.write(bytes(1 << 20))
    refused(places / "bad.nemo", "more than a model can unpack to")
    with gzip.open(places / "long.nemo", "wb") as out:  # a name of 200 MB, which is read as it stands
        member = tarfile.TarInfo("././@LongLink")
        member.type, member.size = tarfile.GNUTYPE_LONGNAME, 200 << 20
        out.write(member.tobuf())
        for _ in range(200):
            out.write(bytes(1 << 20))
    refused(places / "long.nemo", "unpacks to more than")


def test_a_sparse_file_that_claims_a_terabyte_is_refused(places):
    member = tarfile.TarInfo("./model_weights.ckpt")
    member.pax_headers = {"GNU.sparse.major": "0", "GNU.sparse.minor": "1", "GNU.sparse.size": str(1 << 40),
                          "GNU.sparse.map": "0,1"}  # fmt: skip
    with tarfile.open(places / "bad.nemo", "w", format=tarfile.PAX_FORMAT) as tar:
        tar.addfile(member, io.BytesIO(b""))
    refused(places / "bad.nemo", "neither file nor folder|more than a model")


def test_what_is_no_archive_is_refused(places):
    for content in (b"", b"PK\x03\x04", b"\x1f\x8b\x08\x00", b"text\n" * 500, pickle.dumps(Danger())):
        (places / "bad.nemo").write_bytes(content)
        refused(places / "bad.nemo", "not a .nemo file|without model_config")


def test_safetensors_that_unfold_or_lie_are_refused(places, model_for, vocabulary):
    hugging_face.save(model_for(vocabulary, layers=1), places / "model")
    target = places / "model" / "model.safetensors"
    good = target.read_bytes()
    header = int.from_bytes(good[:8], "little")
    lies = {
        "offsets behind the end": good.replace(b'"data_offsets":[', b'"data_offsets":[9', 1),
        "a shape that is not its bytes": good.replace(b'"shape":[', b'"shape":[9', 1),
        "a header cut": good[: header // 2],
        "a header that is no JSON": good[:8] + b"{" * header + good[8 + header :],
        "bytes missing": good[:-100],
    }
    for what, content in lies.items():
        target.write_bytes(content)
        with pytest.raises(DataError, match="cannot be read") as error:
            open_model(places / "model")
        assert "\n" not in str(error.value), what
    save_file({"a": torch.zeros(3)}, target)
    with pytest.raises(DataError, match="missing"):
        open_model(places / "model")


def test_the_vocabulary_given_has_to_be_the_models(whole, vocabulary_for, model_for, vocabulary):
    other = vocabulary_for(genes=60, medians=np.full(60, 3.0))
    with pytest.raises(DataError, match="another vocabulary"):
        open_model(whole, other)
    with pytest.raises(DataError, match="another vocabulary"):
        check_fit(open_model(whole).sizes, other, whole)
