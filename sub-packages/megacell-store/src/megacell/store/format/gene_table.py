# SPDX-License-Identifier: Apache-2.0
"""The store's table of genes: the union over all sources, which grows at its end."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from megacell.core.errors import DataError

Texts = Sequence[str] | np.ndarray[Any, Any]


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
    def read(cls, path: Path) -> "GeneTable":
        """Read a genes-<generation>.parquet."""
        try:
            table = pq.read_table(path)
            return cls(*(table[name].to_numpy() for name in ("gene_id", "symbol", "biotype")))
        except (OSError, KeyError, pa.ArrowInvalid) as error:
            raise DataError(f"{path}: cannot be read ({error}); restore it or convert again") from None

    def write(self, path: Path) -> None:
        """Write the table."""
        columns = {"gene_id": self.gene_ids, "symbol": self.symbols, "biotype": self.biotypes}
        table = pa.table({name: pa.array(values, pa.string()) for name, values in columns.items()})
        pq.write_table(table, path, compression="zstd")
