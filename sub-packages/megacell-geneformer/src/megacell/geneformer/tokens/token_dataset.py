# SPDX-License-Identifier: Apache-2.0
"""Training straight from a tokenised corpus: a Hugging Face `datasets` directory in the place of a cell store.

It has what batches, splits and runs ask of a `CellStore`; its rows are tokens that stand in order already. Files are
mapped. When it is opened, where its cells begin and end is looked at; tokens are when they are asked for.
"""

import json
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa

from megacell.core.errors import DataError
from megacell.core.jit import compiled
from megacell.geneformer.tokens.arrow_stream import open_stream
from megacell.geneformer.tokens.encoder import CellEncoder, cut_lengths, length_limits
from megacell.geneformer.tokens.rank_encoder import RankEncoder
from megacell.geneformer.vocabulary.vocabulary import Vocabulary
from megacell.store import CellStore
from megacell.store.read.reader import Allocate, CellReader, Rows
from megacell.training.foreign.plain import check_shape, read_json, shown

TOKENS, LENGTH = "input_ids", "length"
CHECKED_CELLS = 1000  # cells that are compared with the vocabulary when a corpus is opened; the others when read
LARGEST_STATE = 1 << 26  # bytes of state.json, which names all files


@dataclass(frozen=True)
class CorpusSource:
    """The one source of a corpus' cells; see `megacell.store.read.reader.CellSource`."""

    name: str
    subset: bool = False


class TokenFolder:
    """The cells of a tokenised corpus; made by `TokenFolder.open`.

    Attributes
    ----------
    path : Path
    generation : int
        Always 0: such a directory does not grow.
    digest : str
        Names the content, as far as the names and sizes of its files and its fingerprint tell.
    """

    generation = 0

    def __init__(self, path: Path, vocabulary: Vocabulary, table: pa.Table, digest: str) -> None:
        self.path, self.vocabulary, self._table, self.digest = path, vocabulary, table, digest
        self.gene_ids, self.symbols = vocabulary.gene_ids, vocabulary.symbols
        self.sources = [CorpusSource(path.name)]
        chunks = table[TOKENS].chunks
        self._first = np.cumsum([0, *map(len, chunks)])
        self._offsets = [chunk.offsets.to_numpy() for chunk in chunks]
        self._values = [chunk.values.to_numpy() for chunk in chunks]
        self._is_gene = np.zeros(vocabulary.size, bool)
        self._is_gene[vocabulary.gene_tokens] = True

    @staticmethod
    def is_one(path: str | Path) -> bool:
        """Return whether a path is a directory of `datasets`' layout."""
        return (Path(path) / "state.json").is_file()

    @classmethod
    def open(cls, path: str | Path, vocabulary: Vocabulary) -> "TokenFolder":
        """Map a directory.

        Raises
        ------
        DataError
            A broken directory, no tokens in it, or tokens of another vocabulary.
        """
        path = Path(path)
        try:
            state = read_json(path / "state.json", LARGEST_STATE)
            check_shape(state, {"_data_files": [{"filename": str}]})
            names = [entry["filename"] for entry in state["_data_files"]]
            table = pa.concat_tables([open_stream(_file_in(path, name)) for name in names])
            kind = table.schema.field(TOKENS).type
        except (OSError, KeyError, ValueError, TypeError, pa.ArrowException) as error:
            raise DataError(f"{path}: not a tokenised corpus, or a broken one ({error}); make it again") from None
        if not (pa.types.is_list(kind) or pa.types.is_large_list(kind)) or not pa.types.is_integer(kind.value_type):
            raise DataError(f"{path}: column {TOKENS} holds {kind}, not lists of whole numbers; tokenize again")
        _check_lists(table[TOKENS], path)
        sizes = [(name, (path / name).stat().st_size) for name in names]
        digest = blake2b(json.dumps([state, sizes], sort_keys=True).encode(), digest_size=8).hexdigest()
        folder = cls(path, vocabulary, table, digest)
        folder.gather(np.arange(min(len(folder), CHECKED_CELLS)))
        return folder

    def _check(self, cells: np.ndarray, indptr: np.ndarray, tokens: np.ndarray) -> None:
        """Refuse cells that are not what the vocabulary makes: its specials around them, and genes' tokens between."""
        wrong = (tokens < 0) | (tokens >= len(self._is_gene))
        if not wrong.any():
            wrong = ~self._is_gene[tokens]
            filled = np.flatnonzero(np.diff(indptr) > 0)
            for place, special in enumerate(self.vocabulary.prefix):
                at = np.minimum(indptr[filled] + place, len(tokens) - 1)
                wrong[at] = tokens[at] != special
            for place, special in enumerate(reversed(self.vocabulary.suffix)):
                at = np.maximum(indptr[filled + 1] - 1 - place, 0)
                wrong[at] = tokens[at] != special
        if wrong.any():
            cell = cells[np.searchsorted(indptr, np.argmax(wrong), side="right") - 1]
            raise DataError(
                f"{self.path}: cell {cell:,} was tokenised with another dictionary than vocabulary "
                f"{self.vocabulary.name} (V1 and V2 differ in tokens and specials), or is damaged; give the vocabulary "
                "it was made with, or make the corpus again"
            )

    def __len__(self) -> int:
        return int(self._first[-1])

    def gather(self, indices: Any, allocate: Allocate = np.empty) -> Rows:
        """Return cells' tokens in the place of a store's genes: indptr int64 [n + 1], tokens [z], nothing."""
        cells = np.asarray(indices, np.int64)
        if len(cells) and not 0 <= cells.min() <= cells.max() < len(self):
            raise DataError(f"{self.path}: a cell outside its {len(self):,}")
        chunk_of = np.searchsorted(self._first, cells, side="right") - 1
        rows = [
            self._values[chunk][self._offsets[chunk][row] : self._offsets[chunk][row + 1]]
            for chunk, row in zip(chunk_of.tolist(), (cells - self._first[chunk_of]).tolist(), strict=True)
        ]
        indptr = np.zeros(len(rows) + 1, np.int64)
        np.cumsum([len(row) for row in rows], out=indptr[1:])
        tokens = np.concatenate(rows).astype(np.int64, copy=False) if rows else np.zeros(0, np.int64)
        self._check(cells, indptr, tokens)
        return indptr, tokens, np.zeros(0, np.float32)

    @property
    def obs_columns(self) -> list[str]:
        """Names of the metadata's columns."""
        return [name for name in self._table.column_names if name not in (TOKENS, LENGTH)]

    def obs_slice(self, columns: Sequence[str] | None = None, start: int = 0, stop: int | None = None) -> pd.DataFrame:
        """Return metadata of the cells start … stop - 1, by their numbers; as `CellStore.obs_slice`."""
        names = self.obs_columns if columns is None else list(columns)
        rows = self._table.select(names).slice(start, (len(self) if stop is None else stop) - start)
        try:
            rows.validate(full=True)  # texts and codes lie where the file says
        except pa.ArrowException as error:
            raise DataError(f"{self.path}: its metadata are broken ({error}); make it again") from None
        frame: pd.DataFrame = rows.to_pandas()
        return frame.set_axis(pd.RangeIndex(start, start + len(frame)))

    @property
    def source_of(self) -> np.ndarray:
        """All cells come from one source: uint32 [cells], without memory of that length."""
        return np.broadcast_to(np.uint32(0), len(self))

    @cached_property
    def cell_hash(self) -> np.ndarray:
        """Hash of each cell's tokens: uint64 [cells]."""
        hashes = []
        for mapped, values in zip(self._offsets, self._values, strict=True):
            offsets = np.array(mapped, np.int64)  # a copy: what is mapped may change behind the check
            if len(offsets) and not (offsets[0] >= 0 and offsets[-1] <= len(values) and np.all(np.diff(offsets) >= 0)):
                raise _broken_lists(self.path)
            hashes.append(_hash_rows(offsets, values))
        return np.concatenate(hashes) if hashes else np.zeros(0, np.uint64)


def _file_in(folder: Path, name: str) -> Path:
    """Return a file of a corpus; ValueError for one that lies elsewhere, or is no plain file."""
    if Path(name).name != name:
        raise ValueError(f"it names {shown(name)}, which is no file in the folder")
    if not stat.S_ISREG((folder / name).lstat().st_mode):
        raise ValueError(f"{shown(name)} is a link, or no plain file")
    return folder / name


def _check_lists(column: pa.ChunkedArray, path: Path) -> None:
    """Refuse lists that do not lie in their values, and such as lack values; reads where they begin and end."""
    try:
        column.validate(full=True)
    except pa.ArrowException:
        raise _broken_lists(path) from None
    if column.null_count or any(chunk.values.null_count for chunk in column.chunks):
        raise DataError(f"{path}: column {TOKENS} lacks values; tokenize again")


def _broken_lists(path: Path) -> DataError:
    return DataError(f"{path}: column {TOKENS} is broken: cells begin or end where there are no tokens; tokenize again")


@compiled
def _hash_rows(offsets: np.ndarray, values: np.ndarray) -> np.ndarray:
    hashes = np.empty(len(offsets) - 1, np.uint64)
    for i in range(len(hashes)):
        x = np.uint64(offsets[i + 1] - offsets[i])
        for j in range(offsets[i], offsets[i + 1]):
            x = (x ^ np.uint64(values[j])) * np.uint64(0x9E3779B97F4A7C15)
            x ^= x >> np.uint64(29)
        hashes[i] = x
    return hashes


class TokenCopier:
    """A `CellEncoder` for cells that are tokens already: cuts them to length, and changes nothing else.

    Parameters
    ----------
    vocabulary : Vocabulary
    max_length : int, optional
        Longest cell in tokens, specials included; the vocabulary's own by default.

    Raises
    ------
    UsageError
        ``max_length`` leaves no room for a gene.
    """

    def __init__(self, vocabulary: Vocabulary, max_length: int | None = None) -> None:
        self.vocabulary = vocabulary
        self.max_length, self._specials = length_limits(vocabulary, max_length)

    def known_genes(self, indptr: np.ndarray, genes: np.ndarray, counts: np.ndarray) -> np.ndarray:
        """Return how many genes each cell has, int64 [n]."""
        lengths: np.ndarray = np.maximum(np.diff(indptr) - self._specials, 0)
        return lengths

    def input_lengths(self, known: np.ndarray) -> np.ndarray:
        """Return the tokens, int64, of cells with ``known`` genes: cut at max_length, specials included, 0 for none."""
        return cut_lengths(known, self.max_length, self._specials)

    def encode(
        self,
        indptr: np.ndarray,
        genes: np.ndarray,
        counts: np.ndarray,
        dtype: Any = np.int32,
        allocate: Allocate | None = None,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Copy rows of tokens, cut at max_length before their suffix; arguments as for `CellEncoder.encode`."""
        cu_lengths = np.zeros(len(indptr), np.int64)
        np.cumsum(self.input_lengths(self.known_genes(indptr, genes, counts)), out=cu_lengths[1:])
        out = (allocate or np.empty)(int(cu_lengths[-1]), dtype)
        _cut(indptr, genes, cu_lengths, len(self.vocabulary.suffix), out)
        return out, cu_lengths

    def encode_cells(
        self, reader: CellReader, cells: np.ndarray, dtype: Any = np.int32, allocate: Allocate | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Copy the tokens of cells by number."""
        return self.encode(*reader.gather(cells), dtype, allocate)


@compiled
def _cut(indptr: np.ndarray, tokens: np.ndarray, cu_lengths: np.ndarray, suffix: int, out: np.ndarray) -> None:
    for i in range(len(indptr) - 1):
        kept = cu_lengths[i + 1] - cu_lengths[i]
        if kept > 0:
            row, place = tokens[indptr[i] : indptr[i + 1]], out[cu_lengths[i] : cu_lengths[i + 1]]
            place[: kept - suffix] = row[: kept - suffix]
            place[kept - suffix :] = row[len(row) - suffix :]


def open_cells(path: str | Path, vocabulary: Vocabulary, generation: int | None = None) -> CellStore | TokenFolder:
    """Open a cell store, at its newest generation or an earlier one, or, in its place, a tokenised corpus."""
    return TokenFolder.open(path, vocabulary) if TokenFolder.is_one(path) else CellStore.open(path, generation)


def encoder_for(store: CellReader, vocabulary: Vocabulary, max_length: int | None = None) -> CellEncoder:
    """Return what makes tokens of a store's rows."""
    if isinstance(store, TokenFolder):
        return TokenCopier(vocabulary, max_length)
    return RankEncoder(store.gene_ids, store.symbols, vocabulary, max_length)
