# SPDX-License-Identifier: Apache-2.0
"""Tokenised corpora and stores that somebody made: numbers and texts that lead out of arrays, counts that are none.

All of them are opened by one process, which a segmentation fault would end.
"""

import json
import os
import shutil
from pathlib import Path

import models_made as made
import numpy as np
import pyarrow as pa
import pytest
import xxhash

from megacell.core import cache
from megacell.core.errors import DataError
from megacell.geneformer import Vocabulary
from megacell.geneformer.tokens.rank_encoder import RankEncoder
from megacell.geneformer.tokens.token_dataset import TokenFolder
from megacell.geneformer.vocabulary.histogram_kernels import BITS, DAMAGED, OCTAVES, count_range, split_rows
from megacell.geneformer.vocabulary.medians import gene_medians

CELLS, LENGTH = 2000, 12  # more cells than are looked at when a corpus is opened
AT = 1500  # the cell that is wrong
VOCABULARY = made.RUN / "vocabulary"


def tokens() -> np.ndarray:
    """Return cells' tokens, int32 [CELLS, LENGTH], with their specials."""
    words = Vocabulary.open(VOCABULARY)
    draw = np.random.default_rng(0)
    genes = np.stack([draw.permutation(words.gene_tokens)[: LENGTH - 2] for _ in range(CELLS)])
    return np.hstack([np.full((CELLS, 1), 2), genes, np.full((CELLS, 1), 3)]).astype(np.int32)


def lists(values: np.ndarray, nulls: pa.Buffer | None = None) -> pa.Array:
    """Return cells' tokens as a column."""
    buffers = [nulls, pa.py_buffer(np.arange(0, CELLS * LENGTH + 1, LENGTH, dtype="<i4").tobytes())]
    return pa.Array.from_buffers(pa.list_(pa.int32()), CELLS, buffers, children=[pa.array(values.ravel())])


def texts(end: int) -> pa.Array:
    """Return as many texts of a letter, one of which ends somewhere."""
    offsets = np.arange(CELLS + 1, dtype="<i4")
    offsets[AT] = end
    return pa.Array.from_buffers(
        pa.string(), CELLS, [None, pa.py_buffer(offsets.tobytes()), pa.py_buffer(b"x" * CELLS)]
    )


def write(folder: Path, column: pa.Array, more: dict[str, pa.Array] | None = None, **options) -> Path:
    """Write a corpus of one file."""
    folder.mkdir(parents=True)
    table = pa.table({"input_ids": column, **(more or {})})
    given = pa.ipc.IpcWriteOptions(**options)
    with pa.OSFile(str(folder / "data.arrow"), "wb") as file, pa.ipc.new_stream(file, table.schema, options=given) as s:
        s.write_table(table, max_chunksize=CELLS)
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": "data.arrow"}]}))
    return folder


def offsets_with(at: int, value: int) -> bytes:
    offsets = np.arange(0, CELLS * LENGTH + 1, LENGTH, dtype="<i4")
    offsets[at] = value
    return offsets.tobytes()


def put_offset(folder: Path, at: int, value: int) -> None:
    """Change an offset of a corpus where it lies."""
    content = (folder / "data.arrow").read_bytes()
    with open(folder / "data.arrow", "r+b") as file:
        file.seek(content.index(offsets_with(0, 0)))
        file.write(offsets_with(at, value))


def moved(at: int, value: int):
    def change(folder: Path) -> None:
        put_offset(write(folder, lists(tokens())), at, value)

    return change


def changed(place: int, value: int) -> pa.Array:
    values = tokens()
    values[AT, place] = value
    return lists(values)


def named(name: str):
    def change(folder: Path) -> None:
        write(folder, lists(tokens()))
        (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": name}]}))

    return change


def linked(folder: Path) -> None:
    write(folder, lists(tokens()))
    os.rename(folder / "data.arrow", folder.parent / "elsewhere.arrow")
    (folder / "data.arrow").symlink_to("../elsewhere.arrow")


def piped(folder: Path) -> None:
    write(folder, lists(tokens()))
    (folder / "data.arrow").unlink()
    os.mkfifo(folder / "data.arrow")


def stated(content: str):
    def change(folder: Path) -> None:
        write(folder, lists(tokens()))
        (folder / "state.json").write_text(content)

    return change


BROKEN = "cells begin or end where there are no tokens"
OTHER = f"cell {AT:,} was tokenised with another dictionary"
NULL = pa.py_buffer(bytes([255] * 100 + [254] + [255] * (CELLS // 8)))
CORPORA = {  # what: how it is written, and words of the refusal
    "an offset of 2^31 - 5": (moved(AT, 2**31 - 5), BROKEN),
    "an offset below zero": (moved(AT, -(2**30)), BROKEN),
    "offsets that fall": (moved(AT, 5), BROKEN),
    "a last offset behind the end": (moved(CELLS, 2**30), BROKEN),
    "a token of two thousand million": (lambda f: write(f, changed(4, 2_000_000_000)), OTHER),
    "a token just behind the vocabulary": (lambda f: write(f, changed(4, Vocabulary.open(VOCABULARY).size)), OTHER),
    "a token below zero": (lambda f: write(f, changed(4, -7)), OTHER),
    "a special among genes": (lambda f: write(f, changed(4, 0)), OTHER),
    "a gene for a special": (lambda f: write(f, changed(0, 9)), OTHER),
    "a cell that is missing": (lambda f: write(f, lists(tokens(), nulls=NULL)), "lacks values"),
    "a token that is missing": (
        lambda f: write(f, pa.array([[2, 4, None, 3]] * CELLS, pa.list_(pa.int32()))),
        "lacks values",
    ),
    "texts behind their end": (
        lambda f: write(f, lists(tokens()), {"donor": texts(2**31 - 5)}),
        "its metadata are broken",
    ),
    "codes behind their dictionary": (
        lambda f: write(
            f,
            lists(tokens()),
            {"donor": pa.DictionaryArray.from_arrays(pa.array(np.full(CELLS, 9, np.int32)), ["a"], safe=False)},
        ),
        "its metadata are broken",
    ),
    "a file elsewhere": (named("../elsewhere.arrow"), "which is no file in the folder"),
    "a file by its whole path": (named("/etc/passwd"), "which is no file in the folder"),
    "the folder above": (named(".."), "no plain file"),
    "a link": (linked, "is a link"),
    "a pipe": (piped, "no plain file"),
    "compressed": (lambda f: write(f, lists(tokens()), compression="zstd"), "it is compressed"),
    "lists 200,000 deep": (stated("[" * 200_000), "nested more than 40 deep"),
    "files that are a number": (stated('{"_data_files": 7}'), "_data_files is 7"),
    "a name that is a number": (stated('{"_data_files": [{"filename": 7}]}'), "filename is 7"),
}


def evil_store(folder: Path, value: float) -> Path:
    """Copy a store, its sizes and checksums right, with counts that are none."""
    shutil.copytree(made.STORE, folder)
    manifest = json.loads((folder / "manifest.json").read_bytes())
    shard = manifest["shards"][0]
    counts = np.load(folder / "shards" / shard["name"] / "counts.npy").astype("f4")
    counts[::3] = value
    np.save(folder / "shards" / shard["name"] / "counts.npy", counts)
    shard["files"]["counts.npy"]["dtype"] = "float32"
    for name in ("overflow_positions.npy", "overflow_values.npy"):
        shard["files"].pop(name, None)
    content = (folder / "shards" / shard["name"] / "counts.npy").read_bytes()
    shard["files"]["counts.npy"] |= {"bytes": len(content), "xxh3": xxhash.xxh3_64_hexdigest(content)}
    manifest["checksum"] = "0" * 16
    text = json.dumps(manifest, indent=1).encode() + b"\n"
    text = text.replace(b'"checksum": "' + b"0" * 16, b'"checksum": "' + xxhash.xxh3_64_hexdigest(text).encode())
    for name in ("manifest.json", f"manifest-{manifest['generation']}.json"):
        (folder / name).write_bytes(text)
    return folder


COUNTS = {"infinite": np.inf, "below zero": -5.0, "no number": np.nan}


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    """What came of each corpus and store, and of a good one of each."""
    folder = tmp_path_factory.mktemp("corpora")
    cases = [("good", "read_corpus", [write(folder / "good", lists(tokens())), VOCABULARY])]
    for number, (name, (change, _)) in enumerate(CORPORA.items()):
        change(folder / str(number) / "corpus")
        cases.append((name, "read_corpus", [folder / str(number) / "corpus", VOCABULARY]))
    cases += [(name, "build_vocabulary", [evil_store(folder / name, value)]) for name, value in COUNTS.items()]
    return made.open_all([*cases, ("good store", "build_vocabulary", [made.STORE])], folder)


@pytest.mark.parametrize("name", CORPORA)
def test_a_corpus_is_refused(name, opened):
    opened[name].assert_refused(CORPORA[name][1], seconds=20, megabytes=200)


@pytest.mark.parametrize("name", COUNTS)
def test_a_vocabulary_of_counts_that_are_none_ends(name, opened):
    opened[name].assert_refused(seconds=60)


@pytest.mark.parametrize("value", COUNTS.values(), ids=COUNTS)
def test_a_search_for_medians_of_counts_that_are_none_is_not_begun(value, made_up):
    """Also where a reader lets them pass: the search would not end."""
    counts = np.ones((40, 8))
    counts[7, 3] = value
    with pytest.raises(DataError, match="cell 7 has a count that is negative, infinite or no number"):
        gene_medians(made_up(counts), np.arange(40))


def test_good_ones_are_opened(opened):
    assert opened["good"].kind == opened["good store"].kind == "opened", opened
    assert opened["good"].text == f"{CELLS} cells, {CELLS} rows"


def test_a_file_that_changes_while_it_is_open_is_no_way_out_of_an_array(tmp_path):
    """What was looked at when a corpus was opened may be changed behind that by who can write the file."""
    folder = write(tmp_path / "corpus", lists(tokens()))
    cells = TokenFolder.open(folder, Vocabulary.open(VOCABULARY))
    put_offset(folder, AT, 2**31 - 5)  # in place: the mapping shows it
    with pytest.raises(DataError, match=BROKEN):
        _ = cells.cell_hash


# -- compiled loops, which look at nothing themselves


def test_genes_that_do_not_ascend_are_not_counted_into_another_ranges_histograms():
    genes = np.array([5, 2100, 7, 60_000, 3, 4000], np.uint16)
    bits = np.full(len(genes), 2.5).view(np.uint64)
    first, starts = np.array([0, 2048]), np.empty((3, 1), np.int64)
    split_rows(genes, np.array([0, len(genes)]), first, starts)
    pages, counts, used = (
        np.zeros((2048, OCTAVES), np.int32),
        np.zeros((600, 1 << BITS), np.uint32),
        np.ones(1, np.int64),
    )
    ends = np.array([len(genes)])
    for number in first.tolist():
        at = np.zeros(1, np.int64)
        assert count_range(genes, bits, at, ends, number, pages, counts, used) == DAMAGED


@pytest.mark.parametrize(
    ("indptr", "genes", "words"),
    [
        ([0, 2, 3], np.array([0, 1, 70_000], np.uint32), "row 1 has a gene beyond"),
        ([0, 2, 3], np.array([0, 1, -1], np.int32), "row 1 has a gene beyond"),
        ([0, 2, 3], np.array([0, 4_000_000_000, 1], np.uint32), "row 0 has a gene beyond"),
        ([0, 3, 0, 3], np.array([0, 1, 2], np.uint16), "rows that do not ascend"),
        ([0, 2, 9], np.array([0, 1, 2], np.uint16), "rows that do not ascend"),
        ([-5, 2, 3], np.array([0, 1, 2], np.uint16), "rows that do not ascend"),
    ],
)
def test_rows_that_lead_out_of_arrays_are_not_ranked(indptr, genes, words):
    vocabulary = Vocabulary.open(VOCABULARY)
    encoder = RankEncoder(vocabulary.gene_ids, None, vocabulary)
    for given in (encoder.encode, encoder.known_genes):
        with pytest.raises(DataError, match=words):
            given(np.array(indptr, np.int64), genes, np.ones(len(genes), np.float32))


# -- the cache of lengths


@pytest.mark.parametrize("at", [-1, -9, 200], ids=["in the checksum", "in the last length", "in a length"])
def test_a_cached_array_that_was_changed_is_not_taken(at, tmp_path):
    path, array = tmp_path / "a.npy", np.arange(1000, dtype=np.uint16)
    cache.keep(path, array)
    found = cache.mapped(path, array.dtype, len(array))
    assert found is not None
    assert found.tolist() == array.tolist()
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)
    assert cache.mapped(path, array.dtype, len(array)) is None


def test_a_cached_array_that_was_cut_lengthened_or_kept_by_an_earlier_version_is_not_taken(tmp_path):
    path, array = tmp_path / "a.npy", np.arange(1000, dtype=np.uint16)
    cache.keep(path, array)
    content = path.read_bytes()
    for other in (content[:-1], content[:-8], content + b"\0", content[:100], b""):
        path.write_bytes(other)
        assert cache.mapped(path, array.dtype, len(array)) is None
    np.save(path, array)
    assert cache.mapped(path, array.dtype, len(array)) is None
