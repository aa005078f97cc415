# SPDX-License-Identifier: Apache-2.0
"""Geneformer's dictionaries: the published ones read as any unpickler reads them, everything else refused by name."""

import hashlib
import os
import pickle
from collections import OrderedDict

import numpy as np
import pytest

from megacell.core.errors import DataError
from megacell.geneformer.vocabulary.geneformer_dictionaries import import_geneformer, read_dictionary
from megacell.geneformer.vocabulary.published import PUBLISHED_FILES

KINDS = {"tokens": int, "medians": float, "gene_ids": str, "symbols": str}


@pytest.fixture
def pickled(tmp_path):
    """Write something as a pickle and return its path."""

    def write(content, protocol=4, name="some.pkl"):
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else pickle.dumps(content, protocol))
        return path

    return write


@pytest.mark.parametrize("part", KINDS)
@pytest.mark.parametrize("edition", ["V1", "V2"])
def test_the_published_dictionaries_are_read_to_the_last_bit(edition, part, dictionaries):
    path = dictionaries[edition][part]
    content = path.read_bytes()
    known_to_be_harmless = PUBLISHED_FILES[f"geneformer-{edition.lower()}"][part][1]
    assert hashlib.sha256(content).hexdigest() == known_to_be_harmless
    expected = pickle.loads(content)  # whose SHA-256 was compared
    found = read_dictionary(path, KINDS[part])
    assert list(found.items()) == list(expected.items())
    assert {type(value) for value in found.values()} == {KINDS[part]}


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_containers_inside_are_read_and_then_found_to_be_none_of_the_dictionaries(protocol, pickled):
    with pytest.raises(DataError, match="is not a string to int"):
        read_dictionary(pickled({"a": {1}, "b": frozenset([(2, 3)]), "c": [4]}, protocol), int)


@pytest.mark.parametrize("protocol", [3, 4, 5])
@pytest.mark.parametrize("dtype", [">f8", "<f4", np.int16, np.uint64, ">i4"])
def test_numbers_of_any_width_and_byte_order_are_read(dtype, protocol, pickled):
    values = {"a": np.array([12], dtype)[0], "b": np.array([200], ">f8").astype(dtype)[0]}
    kind = float if np.dtype(dtype).kind == "f" else int
    assert read_dictionary(pickled(values, protocol), kind) == {"a": 12, "b": 200}


class Danger:
    """Unpickles as a call of ``function``."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize(
    ("content", "name"),
    [
        (Danger(os.system, "exit 1"), r"posix\.system"),
        (Danger(eval, "1"), r"builtin.*\.eval"),
        (Danger(getattr, "a", "upper"), r"builtin.*\.getattr"),
        ({"a": Danger(np.load, "x.npy")}, r"numpy.*load"),
        ({"a": np.arange(3)}, r"_reconstruct|_frombuffer"),
        ({"a": np.str_("b")}, "dtype 'U1'"),
        ({"a": OrderedDict(b="c")}, r"collections\.OrderedDict"),
        (Danger(np.dtype, "O"), "dtype 'O'"),
    ],
    ids=[
        "a shell",
        "eval",
        "getattr",
        "numpy.load",
        "an array",
        "a numpy text",
        "another container",
        "a dtype of objects",
    ],
)
@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_anything_else_in_a_pickle_is_refused_by_name_and_not_run(content, name, protocol, pickled, monkeypatch):
    monkeypatch.setattr(os, "system", lambda *_: pytest.fail("the pickle was run"))
    if protocol < 4 and name == "dtype 'U1'":
        name = r"_codecs\.encode|dtype 'U1'"  # how old protocols hold bytes
    with pytest.raises(DataError, match=f"some.pkl.*{name}"):
        read_dictionary(pickled(content, protocol), str)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x80",
        b"not a pickle",
        b"\x80\x04}\x94(",
        b"cos\n",
        b"\x80\x04\x8c\x03ab",
        b"(lp0\nS'a\n.",
        b"h\x05.",
        b"R.",
    ],
)
def test_what_is_no_pickle_is_refused(content, pickled):
    with pytest.raises(DataError, match=r"some\.pkl"):
        read_dictionary(pickled(content), str)


def test_every_cut_of_a_dictionary_is_refused(pickled):
    whole = pickle.dumps({"a": np.float64(1.5), "b": np.float64(2.5)})
    for length in range(len(whole)):
        with pytest.raises(DataError):
            read_dictionary(pickled(whole[:length]), float)


@pytest.mark.parametrize(
    ("content", "kind"),
    [([], int), ({}, int), ({"a": "b"}, int), ({1: 2}, int), ({"a": 1.5}, int), ({"a": True}, int), ({"a": [1]}, str)],
    ids=["a list", "nothing", "texts", "numbers for names", "fractions", "truth values", "a nested list"],
)
def test_another_dictionary_than_the_one_asked_for_is_refused(content, kind, pickled):
    with pytest.raises(DataError, match=r"some\.pkl"):
        read_dictionary(pickled(content), kind)


def test_a_path_without_a_file_is_named(tmp_path):
    with pytest.raises(DataError, match=r"absent\.pkl: no such file"):
        read_dictionary(tmp_path / "absent.pkl", int)


@pytest.mark.parametrize(
    ("edition", "genes", "size", "prefix", "suffix", "max_length", "specials"),
    [
        ("V1", 25_424, 25_426, (), (), 2048, {"pad": 0, "mask": 1}),
        ("V2", 20_271, 20_275, (2,), (3,), 4096, {"pad": 0, "mask": 1, "cls": 2, "eos": 3}),
    ],
)
def test_each_edition_is_recognised(edition, genes, size, prefix, suffix, max_length, specials, published):
    vocabulary = published[edition]
    assert vocabulary.name == f"geneformer-{edition.lower()}"
    assert (len(vocabulary.gene_ids), vocabulary.size) == (genes, size)
    assert (vocabulary.prefix, vocabulary.suffix, vocabulary.max_length) == (prefix, suffix, max_length)
    assert vocabulary.specials == specials
    assert vocabulary.split is None


@pytest.mark.parametrize("part", ["medians", "gene_ids", "symbols"])
@pytest.mark.parametrize(("one", "other"), [("V1", "V2"), ("V2", "V1")])
def test_dictionaries_of_two_editions_are_no_pair(one, other, part, dictionaries):
    mixed = {**dictionaries[one], part: dictionaries[other][part]}
    with pytest.raises(DataError, match=f"belongs to geneformer-{other.lower()}"):
        import_geneformer(**mixed)


def test_tokens_without_medians_are_no_pair(pickled):
    tokens = pickled({"<pad>": 0, "<mask>": 1, "ENSG00000000001": 2, "ENSG00000000002": 3}, name="tokens.pkl")
    medians = pickled({"ENSG00000000001": 1.0}, name="medians.pkl")
    with pytest.raises(DataError, match=r"medians\.pkl: has no median for 1 genes.*ENSG00000000002"):
        import_geneformer(tokens, medians)


@pytest.mark.parametrize("special", ["<unk>", "<>"])
def test_a_special_of_another_kind_is_refused(special, pickled):
    tokens = pickled({"<pad>": 0, "<mask>": 1, special: 2, "ENSG00000000001": 3}, name="tokens.pkl")
    with pytest.raises(DataError, match="specials"):
        import_geneformer(tokens, pickled({"ENSG00000000001": 1.0}, name="medians.pkl"))


def test_a_dictionary_of_ones_own_is_imported(pickled):
    tokens = pickled({"<pad>": 0, "<mask>": 1, "ENSG00000000001": 2}, name="tokens.pkl")
    medians = pickled({"ENSG00000000001": 1, "ENSG00000000009": 2.0}, name="medians.pkl")
    ids = pickled({"OLD": "ENSG00000000001", "GONE": "ENSG00000000009"}, name="ids.pkl")
    vocabulary = import_geneformer(tokens, medians, ids, name="mine")
    assert vocabulary.name == "mine"
    assert vocabulary.aliases == {"OLD": "ENSG00000000001"}
