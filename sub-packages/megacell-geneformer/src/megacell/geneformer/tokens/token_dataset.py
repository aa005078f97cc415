# SPDX-License-Identifier: Apache-2.0
"""Training straight from a tokenised corpus: a Hugging Face `datasets` directory in the place of a cell store.

It has what batches, splits and runs ask of a `CellStore`; its rows are tokens that stand in order already. Files are
mapped; nothing of the corpus is read before its cells are asked for, except for a look at its first ones.
"""

import json
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
from megacell.geneformer.tokens.encoder import CellEncoder, cut_lengths, length_limits
from megacell.geneformer.tokens.rank_encoder import RankEncoder
from megacell.geneformer.vocabulary.vocabulary import Vocabulary
from megacell.store import CellStore
from megacell.store.read.reader import Allocate, CellReader, Rows

TOKENS, LENGTH = "input_ids", "length"
CHECKED_CELLS = 1000  # cells that are compared with the vocabulary when a corpus is opened


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
            state = json.loads((path / "state.json").read_text(encoding="utf-8"))
            names = [entry["filename"] for entry in state["_data_files"]]
            tables = [pa.ipc.open_stream(pa.memory_map(str(path / name))).read_all() for name in names]
            table = pa.concat_tables(tables)
            kind = table.schema.field(TOKENS).type
        except (OSError, KeyError, ValueError, TypeError, pa.ArrowException) as error:
            raise DataError(f"{path}: not a tokenised corpus, or a broken one ({error}); make it again") from None
        if not (pa.types.is_list(kind) or pa.types.is_large_list(kind)) or not pa.types.is_integer(kind.value_type):
            raise DataError(f"{path}: column {TOKENS} holds {kind}, not lists of whole numbers; tokenize again")
        sizes = [(name, (path / name).stat().st_size) for name in names]
        digest = blake2b(json.dumps([state, sizes], sort_keys=True).encode(), digest_size=8).hexdigest()
        folder = cls(path, vocabulary, table, digest)
        folder._check_vocabulary()
        return folder

    def _check_vocabulary(self) -> None:
        """Refuse a corpus of another vocabulary, as far as its first cells show."""
        indptr, tokens, _ = self.gather(np.arange(min(len(self), CHECKED_CELLS)))
        known = np.isin(tokens, [*self.vocabulary.gene_tokens, *self.vocabulary.specials.values()])
        filled = np.flatnonzero(np.diff(indptr) > 0)
        fits = bool(known.all())
        for place, special in enumerate(self.vocabulary.prefix):
            fits = fits and bool((tokens[indptr[filled] + place] == special).all())
        for place, special in enumerate(reversed(self.vocabulary.suffix)):
            fits = fits and bool((tokens[indptr[filled + 1] - 1 - place] == special).all())
        if not self.vocabulary.prefix:
            fits = fits and not np.isin(tokens, list(self.vocabulary.specials.values())).any()
        if not fits:
            raise DataError(
                f"{self.path}: tokenised with another dictionary than vocabulary {self.vocabulary.name} (V1 and V2 "
                "differ in tokens and specials); give the vocabulary it was made with"
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
        return indptr, tokens, np.zeros(0, np.float32)

    @property
    def obs_columns(self) -> list[str]:
        """Names of the metadata's columns."""
        return [name for name in self._table.column_names if name not in (TOKENS, LENGTH)]

    def obs_slice(self, columns: Sequence[str] | None = None, start: int = 0, stop: int | None = None) -> pd.DataFrame:
        """Return metadata of the cells start … stop - 1, by their numbers; as `CellStore.obs_slice`."""
        names = self.obs_columns if columns is None else list(columns)
        rows = self._table.select(names).slice(start, (len(self) if stop is None else stop) - start)
        frame: pd.DataFrame = rows.to_pandas()
        return frame.set_axis(pd.RangeIndex(start, start + len(frame)))

    @property
    def source_of(self) -> np.ndarray:
        """All cells come from one source: uint32 [cells], without memory of that length."""
        return np.broadcast_to(np.uint32(0), len(self))

    @cached_property
    def cell_hash(self) -> np.ndarray:
        """Hash of each cell's tokens: uint64 [cells]."""
        hashes = [_hash_rows(np.asarray(o, np.int64), v) for o, v in zip(self._offsets, self._values, strict=True)]
        return np.concatenate(hashes) if hashes else np.zeros(0, np.uint64)


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
