# SPDX-License-Identifier: Apache-2.0
"""The file beside a vocabulary by which it can be merged: its cells' histograms, and which cells they are."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from megacell.core.errors import DataError
from megacell.geneformer.vocabulary.build import TrainingCells
from megacell.geneformer.vocabulary.gene_names import Genes
from megacell.geneformer.vocabulary.histogram_kernels import BITS
from megacell.geneformer.vocabulary.histograms import Histograms
from megacell.geneformer.vocabulary.tables import PLAIN, read_table, texts
from megacell.geneformer.vocabulary.vocabulary import MOST_TOKENS, Vocabulary
from megacell.store import CellStore

NAME = "histograms.parquet"
FORMAT, VERSION = "megacell-histograms", 1
_META = b"megacell"
_TYPES = {
    **dict.fromkeys(("gene_id", "symbol", "biotype"), pa.string()),
    "buckets": pa.large_list(pa.int32()),
    "cells": pa.large_list(pa.int64()),
}
_MEND = "build the vocabulary again with --mergeable"


@dataclass(frozen=True)
class CountedStore:
    """A store whose training cells were counted.

    Attributes
    ----------
    digest, generation, cells
        Of the store, as it was.
    training_cells : int
        How many were counted.
    split_by : str
        By what they were told from those held out.
    fingerprint, training_fingerprint : str
        XXH3-64 of the cells' hashes in their order: of all cells, and of those counted.
    sources : tuple of str
        Hashes of the input files of the cells counted.
    vocabulary : str
        Hash of the vocabulary that they were counted for; "" for the one that the file lies beside.
    """

    digest: str
    generation: int
    cells: int
    training_cells: int
    split_by: str
    fingerprint: str
    training_fingerprint: str
    sources: tuple[str, ...]
    vocabulary: str = ""

    @classmethod
    def of(cls, store: CellStore, cells: np.ndarray, level: str) -> "CountedStore":
        """Describe the counting of some cells, ascending, of a store that was split at a level."""
        numbers = np.unique(store.source_of[cells])
        return cls(
            digest=store.digest,
            generation=store.generation,
            cells=len(store),
            training_cells=len(cells),
            split_by=level,
            fingerprint=fingerprint(store.cell_hash),
            training_fingerprint=fingerprint(store.cell_hash[cells]),
            sources=tuple(sorted(store.sources[number].hash for number in numbers)),
        )

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> "CountedStore":
        """Read what `asdict` gave."""
        return cls(**{**content, "sources": tuple(content["sources"])})

    @property
    def name(self) -> dict[str, Any]:
        """What a vocabulary's provenance tells of a store."""
        return {"digest": self.digest, "generation": self.generation, "cells": self.cells}


def fingerprint(hashes: np.ndarray) -> str:
    """Return the XXH3-64 of cells' hashes, in hexadecimal."""
    return xxhash.xxh3_64_hexdigest(np.ascontiguousarray(hashes, "<u8").data)


@dataclass(frozen=True, eq=False)
class Counted:
    """Histograms, and of which cells they are.

    Attributes
    ----------
    histograms : Histograms
    stores : tuple of CountedStore
    split : dict
        `SplitSettings` of all stores, as a dictionary.
    allow_subset : bool
        Whether cells of sources with a subset of genes are among them.
    """

    histograms: Histograms
    stores: tuple[CountedStore, ...]
    split: dict[str, Any]
    allow_subset: bool

    @classmethod
    def of(cls, training: TrainingCells, workers: int = 1) -> "Counted":
        """Count the values of training cells."""
        parts = [Histograms.count(s, cells, workers) for s, cells in zip(training.stores, training.cells, strict=True)]
        each = zip(training.stores, training.cells, training.levels, strict=True)
        stores = tuple(CountedStore.of(*one) for one in each)
        return cls(Histograms.sum(parts), stores, training.settings.to_dict(), training.allow_subset)

    @classmethod
    def open(cls, folder: str | Path, vocabulary: Vocabulary) -> "Counted":
        """Read the file beside a vocabulary.

        Raises
        ------
        DataError
            None there, a newer format, other buckets, a file that has changed, or one of another vocabulary.
        """
        path = Path(folder) / NAME
        if not path.is_file():
            raise DataError(f"{folder}: has no {NAME}, without which nothing can be added to its medians; {_MEND}")
        try:
            table = read_table(path, _TYPES, MOST_TOKENS, ("ZSTD", *PLAIN))
            meta = json.loads((table.schema.metadata or {})[_META])
            if meta["format"] != FORMAT:
                raise DataError(f"{path}: holds no histograms; {_MEND}")
            if meta["version"] > VERSION:
                raise DataError(f"{path}: version {meta['version']} is newer than this program reads; update it")
            written = meta.pop("sha256")
            histograms = _from_table(table)
            stores = tuple(CountedStore.from_dict(store) for store in meta["stores"])
            counted = cls(histograms, stores, meta["split"], meta["allow_subset"])
            of, bits = meta["vocabulary"], meta["bits"]
        except (ValueError, KeyError, TypeError, AttributeError, OSError, RecursionError, pa.ArrowException) as error:
            raise DataError(f"{path}: broken ({error}); {_MEND}") from None
        if _hash(meta, histograms) != written:
            raise DataError(f"{path}: has changed since it was written; {_MEND}")
        if of != vocabulary.hash:
            raise DataError(f"{path}: belongs to another vocabulary ({of[:12]}…); {_MEND}")
        if bits != BITS:
            raise DataError(f"{path}: counted in buckets of {bits} bits, where this program has {BITS}; {_MEND}")
        return counted

    def write(self, folder: Path, vocabulary: Vocabulary) -> None:
        """Write the file beside a vocabulary; flushing is left to the caller."""
        meta = {
            "format": FORMAT,
            "version": VERSION,
            "vocabulary": vocabulary.hash,
            "bits": BITS,
            "stores": [asdict(store) for store in self.stores],
            "split": self.split,
            "allow_subset": self.allow_subset,
        }
        signed = {**meta, "sha256": _hash(meta, self.histograms)}
        table = _to_table(self.histograms).replace_schema_metadata({_META: json.dumps(signed, sort_keys=True)})
        pq.write_table(
            table, folder / NAME, compression="zstd", row_group_size=1 << 12, use_dictionary=["biotype"],
            column_encoding={f"{name}.list.element": "DELTA_BINARY_PACKED" for name in ("buckets", "cells")},
        )  # fmt: skip


def _hash(meta: Mapping[str, Any], histograms: Histograms) -> str:
    """Return the SHA-256, hex, of all that the file holds, whatever its layout."""
    genes = histograms.genes
    texts = [dict(meta), list(genes.ids), list(genes.symbols), list(genes.biotypes)]
    digest = hashlib.sha256(json.dumps(texts, sort_keys=True, separators=(",", ":")).encode())
    for array, kind in ((histograms.bounds, "<i8"), (histograms.buckets, "<i4"), (histograms.cells, "<i8")):
        digest.update(np.ascontiguousarray(array, kind).data)
    return digest.hexdigest()


def _to_table(histograms: Histograms) -> pa.Table:
    """Return a row a gene; its buckets and how many cells are in each stand in lists."""
    names = {"gene_id": histograms.genes.ids, "symbol": histograms.genes.symbols, "biotype": histograms.genes.biotypes}
    columns = {name: pa.array(values, pa.string()) for name, values in names.items()}
    for name, values in (("buckets", histograms.buckets), ("cells", histograms.cells)):
        columns[name] = pa.LargeListArray.from_arrays(histograms.bounds, values)
    return pa.table(columns)


def _from_table(table: pa.Table) -> Histograms:
    """Return the histograms of `_to_table`."""
    names = ("gene_id", "symbol", "biotype")
    genes = Genes(*(texts(table.column(name)).to_numpy(zero_copy_only=False) for name in names))
    columns = {name: table.column(name).combine_chunks() for name in ("buckets", "cells")}
    lengths = columns["buckets"].value_lengths()
    if lengths.null_count or lengths != columns["cells"].value_lengths():
        raise ValueError("as many counts as buckets are expected")
    if (genes.ids[1:] <= genes.ids[:-1]).any():
        raise ValueError("genes are expected once each, by ascending id")
    bounds = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths.to_numpy())])
    buckets, cells = (columns[name].flatten().to_numpy() for name in ("buckets", "cells"))
    return Histograms(genes, bounds, buckets, cells)
