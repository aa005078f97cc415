# SPDX-License-Identifier: Apache-2.0
"""The store's table of genes: the union over all sources, which grows at its end."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import xxhash

from megacell.core.errors import DataError
from megacell.store.format.tables import open_table

Texts = Sequence[str] | np.ndarray[Any, Any]
COLUMNS = ("gene_id", "symbol", "biotype")
MOST_GENES = 1 << 22  # of a store; a table with more would be no table of genes, but one that is to fill the memory
_MOST_TEXT = 1 << 30  # bytes of a column's texts together


class GeneTable:
    """The store's genes; append-only, so that a gene's number never changes.

    Attributes
    ----------
    gene_ids, symbols, biotypes : object str [genes]
        "" where a symbol or biotype is unknown.
    """

    def __init__(self, gene_ids: Texts = (), symbols: Texts = (), biotypes: Texts = ()) -> None:
        self.gene_ids, self.symbols, self.biotypes = (np.array(t, object) for t in (gene_ids, symbols, biotypes))
        self._numbers = pd.Index(self.gene_ids, dtype=object)
        if not self._numbers.is_unique:
            raise DataError("a gene id stands twice in the gene table; run `megacell verify`")

    def __len__(self) -> int:
        return len(self.gene_ids)

    def add(self, gene_ids: Texts, symbols: Texts, biotypes: Texts) -> np.ndarray[Any, np.dtype[np.int32]]:
        """Return the genes' numbers; new ones are added at the end, unknown symbols are filled in."""
        ids, symbols, biotypes = (np.asarray(t, object) for t in (gene_ids, symbols, biotypes))
        numbers = self._numbers.get_indexer(ids)
        new = np.flatnonzero((numbers < 0) & ~pd.Index(ids).duplicated())
        if len(new):
            self.gene_ids = np.concatenate([self.gene_ids, ids[new]])
            self.symbols = np.concatenate([self.symbols, symbols[new]])
            self.biotypes = np.concatenate([self.biotypes, biotypes[new]])
            self._numbers = pd.Index(self.gene_ids, dtype=object)
            numbers = self._numbers.get_indexer(ids)
        for own, known in ((symbols, self.symbols), (biotypes, self.biotypes)):
            fill = known[numbers] == ""
            known[numbers[fill]] = own[fill]
        return np.asarray(numbers, np.int32)

    def hashes(self) -> np.ndarray[Any, np.dtype[np.uint64]]:
        """Return XXH3-64 of each id: uint64 [genes]."""
        return np.fromiter(map(xxhash.xxh3_64_intdigest, map(str.encode, self.gene_ids)), np.uint64, len(self))

    @classmethod
    def read(cls, path: Path, genes: int | None = None) -> "GeneTable":
        """Read a genes-<generation>.parquet.

        Parameters
        ----------
        path : Path
        genes : int, optional
            How many the manifest says there are.

        Raises
        ------
        DataError
            A link, a damaged table, or another number of genes.
        """
        with open_table(path, rows=genes, as_codes=COLUMNS) as file:
            if file.metadata.num_rows > MOST_GENES:
                raise ValueError(f"{file.metadata.num_rows:,} genes, and {MOST_GENES:,} at most are taken")
            table = file.read(list(COLUMNS))
            return cls(*(_texts(table[name]) for name in COLUMNS))

    def write(self, path: Path) -> None:
        """Write the table."""
        columns = {"gene_id": self.gene_ids, "symbol": self.symbols, "biotype": self.biotypes}
        table = pa.table({name: pa.array(values, pa.string()) for name, values in columns.items()})
        pq.write_table(table, path, compression="zstd")


def _texts(column: pa.ChunkedArray) -> np.ndarray[Any, Any]:
    """Return a column of text, read as codes, after a look at how long its texts are together."""
    if column.null_count or not pa.types.is_dictionary(column.type):
        raise ValueError("a column of texts is none, or lacks some")
    size = 0
    for chunk in column.chunks:
        size += pc.sum(pc.take(pc.binary_length(chunk.dictionary), chunk.indices)).as_py() or 0
        if size > _MOST_TEXT:
            raise ValueError(f"texts of over {_MOST_TEXT >> 30} GiB in a column")
    return np.array(column.cast(pa.string()).to_pylist(), object)
