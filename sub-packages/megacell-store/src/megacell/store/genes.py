# SPDX-License-Identifier: Apache-2.0
"""Genes: which of a file's features are genes, their ids found by content, and the store's union table."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from megacell.store.durable import TEMPORARY, flush_file, move_into_place
from megacell.store.errors import DataError, UsageError

Texts = Sequence[str] | np.ndarray[Any, Any]
FEWEST = 10_000  # genes a source must have measured; fewer is a selection, which shifts medians
_ENSEMBL = re.compile(r"ENS[A-Z]*G\d{11}(\..*)?")
_VERSION = re.compile(r"^(ENS[A-Z]*\d{11})\..*$")
_SPIKE_IN = re.compile(r"ERCC-\d{5}")
_ANTIBODY = re.compile(r".*_TotalSeq-?[A-D]?$|(ADT|HTO)[-_].*")  # 10x's and cite-seq's names, where no type is given
_MADE_UNIQUE = re.compile(r"(.+)-\d+")
_GENE_TYPES = {"gene expression", "rna", "gex", "gene"}
_SYMBOL_COLUMNS = (
    "feature_name",
    "gene_symbols",
    "gene_symbol",
    "symbol",
    "gene_name",
    "gene_names",
    "gene_short_name",
)
_BIOTYPE_COLUMNS = ("feature_type", "gene_type", "biotype", "gene_biotype")


@dataclass(frozen=True)
class Features:
    """What a file's columns are.

    Attributes
    ----------
    gene_ids, symbols, biotypes : object str [genes]
        One row a distinct gene; "" where unknown. Ids are the symbols where `ids` is "symbol".
    gene_of : int32 [columns]
        Row of each column of the matrix, -1 for a feature that is not a gene.
    ids : str
        "ensembl" or "symbol".
    notes : list of str
        What was dropped or summed.

    """

    gene_ids: np.ndarray[Any, Any]
    symbols: np.ndarray[Any, Any]
    biotypes: np.ndarray[Any, Any]
    gene_of: np.ndarray[Any, Any]
    ids: str
    notes: list[str] = field(default_factory=list)


def read_features(var: pd.DataFrame, where: str, gene_ids: str = "auto", other: pd.DataFrame | None = None) -> Features:
    """Find the genes of a file.

    Parameters
    ----------
    var : DataFrame [columns of the matrix]
        The file's own table of features.
    where : str
        File and place, for messages.
    gene_ids : str
        "auto", "index", or a column's name.
    other : DataFrame, optional
        The file's main var where `var` is that of raw, which often lacks the features' types.

    Raises
    ------
    DataError
        No names of genes, or no feature that is a gene.
    UsageError
        A column that is not there.

    """
    texts = {"index": _clean(var.index)} | {str(c): _clean(var[c]) for c in var.columns if _is_text(var[c])}
    if gene_ids not in ("auto", *texts):
        raise UsageError(f"{where}: has no text column {gene_ids!r} in var; --gene-ids can be {', '.join(texts)}")
    notes: list[str] = []
    is_gene = _genes_only(var, texts["index"], where, other, notes)
    column = _most_ensembl(texts, is_gene) if gene_ids == "auto" else gene_ids
    symbols = _symbols(texts, column)
    named = np.array([_ENSEMBL.fullmatch(i) is not None for i in texts[column]])
    is_ensembl = bool(named[is_gene].mean() >= 0.5)
    ids = texts[column].copy() if is_ensembl or gene_ids != "auto" else symbols.copy()
    if is_ensembl:
        ids = np.array([_VERSION.sub(r"\1", i) for i in ids], dtype=object)
        nameless = is_gene & ~named
        ids[nameless] = np.where(symbols[nameless] != "", symbols[nameless], ids[nameless])
        if nameless.any():
            notes.append(f"{nameless.sum():,} genes without an Ensembl id go by their symbol")
    elif np.mean([i.isdecimal() or not i for i in ids[is_gene]]) > 0.5:
        raise DataError(
            f"{where}: genes are numbered, not named; name the column that holds their ids: --gene-ids COLUMN"
        )
    if unnamed := int((is_gene & (ids == "")).sum()):
        notes.append(f"{unnamed:,} columns without a name dropped")
    is_gene &= ids != ""
    biotypes = next((texts[c] for c in _BIOTYPE_COLUMNS if c in texts), np.full(len(var), "", object))
    return _distinct(ids, symbols, biotypes, is_gene, "ensembl" if is_ensembl else "symbol", notes)


def _distinct(
    ids: np.ndarray[Any, Any],
    symbols: np.ndarray[Any, Any],
    biotypes: np.ndarray[Any, Any],
    is_gene: np.ndarray[Any, Any],
    kind: str,
    notes: list[str],
) -> Features:
    """Give columns with the same id one gene: their counts will be summed."""
    columns = np.flatnonzero(is_gene)
    numbers, distinct = pd.factorize(ids[columns])
    first = columns[np.unique(numbers, return_index=True)[1]]
    gene_of = np.full(len(ids), -1, np.int32)
    gene_of[columns] = numbers
    if len(distinct) < len(columns):
        notes.append(f"{len(columns) - len(distinct):,} columns share an id with another: summed")
    if kind == "ensembl":
        named = symbols[first][symbols[first] != ""]
        ambiguous = int((pd.Series(named).value_counts() > 1).sum())
    else:  # what anndata's var_names_make_unique left: GENE and GENE-1 are two genes with one symbol
        every = set(distinct)
        ambiguous = sum(m is not None and m[1] in every for m in (_MADE_UNIQUE.fullmatch(i) for i in distinct))
    if ambiguous:
        notes.append(f"{ambiguous:,} ambiguous symbols")
    return Features(np.asarray(distinct, object), symbols[first], biotypes[first], gene_of, kind, notes)


def _genes_only(
    var: pd.DataFrame, names: np.ndarray[Any, Any], where: str, other: pd.DataFrame | None, notes: list[str]
) -> np.ndarray[Any, Any]:
    """Return bool [columns]: antibodies, guides, peaks and spike-ins bear gene names and would be summed in."""
    is_gene = np.ones(len(var), bool)
    types = None
    if "feature_types" in var:
        types = _clean(var["feature_types"])
    elif other is not None and "feature_types" in other:
        known = dict(zip(_clean(other.index), _clean(other["feature_types"]), strict=True))
        types = np.array([known.get(name, "Gene Expression") for name in names], object)
    if types is not None:
        is_gene = np.array([t.lower() in _GENE_TYPES for t in types])
        if not is_gene.any():
            kinds = ", ".join(sorted(set(types))[:5])
            raise DataError(
                f"{where}: no Gene Expression feature (feature_types: {kinds}); give a file with RNA counts"
            )
        for kind, n in pd.Series(types[~is_gene]).value_counts().items():
            notes.append(f"{n:,} {kind} features dropped")
    spike_in = np.array([_SPIKE_IN.fullmatch(name) is not None for name in names])
    if "feature_biotype" in var:
        spike_in |= _clean(var["feature_biotype"]) == "spike-in"
    antibody = np.array([_ANTIBODY.fullmatch(name) is not None for name in names])
    for kind, found in (("spike-in", spike_in), ("antibody", antibody)):
        if n := int((is_gene & found).sum()):
            notes.append(f"{n:,} {kind} features dropped (by name)")
        is_gene &= ~found
    if not is_gene.any():
        raise DataError(f"{where}: measures no genes; give a file with RNA counts")
    return is_gene


def _most_ensembl(texts: Mapping[str, np.ndarray[Any, Any]], is_gene: np.ndarray[Any, Any]) -> str:
    """Return the column with most Ensembl gene ids, the index where none has any."""
    share = {c: np.mean([_ENSEMBL.fullmatch(i) is not None for i in ids[is_gene]]) for c, ids in texts.items()}
    return max(share, key=lambda c: share[c])  # the first of equals: the index stands first


def _symbols(texts: Mapping[str, np.ndarray[Any, Any]], id_column: str) -> np.ndarray[Any, Any]:
    """Return the symbols: a column known by its name, else the index unless that holds the ids."""
    if id_column != "index" and np.mean([i.isdecimal() for i in texts["index"]]) < 0.5:
        return texts["index"]
    named = next((texts[c] for c in _SYMBOL_COLUMNS if c in texts and c != id_column), None)
    if named is not None:
        return named
    has_ids = np.mean([_ENSEMBL.fullmatch(i) is not None for i in texts["index"]]) >= 0.5
    return np.full(len(texts["index"]), "", object) if has_ids else texts["index"]


def _is_text(column: pd.Series) -> bool:
    values = column.cat.categories if isinstance(column.dtype, pd.CategoricalDtype) else column
    return bool(pd.api.types.is_object_dtype(values.dtype) or pd.api.types.is_string_dtype(values.dtype))


def _clean(values: Any) -> np.ndarray[Any, Any]:
    """Return texts without outer blanks, "" where missing."""
    series = pd.Series(np.asarray(values, dtype=object))
    return np.asarray(series.where(series.notna(), "").astype(str).str.strip(), dtype=object)


class GeneTable:
    """The store's genes; append-only, so that a gene's number never changes.

    Attributes
    ----------
    gene_ids, symbols, biotypes : list of str

    """

    def __init__(self, gene_ids: Sequence[str] = (), symbols: Sequence[str] = (), biotypes: Sequence[str] = ()) -> None:
        self.gene_ids, self.symbols, self.biotypes = list(gene_ids), list(symbols), list(biotypes)
        self._number = {gene: i for i, gene in enumerate(self.gene_ids)}
        if len(self._number) != len(self.gene_ids):
            raise DataError("a gene id stands twice in the gene table; run `megacell verify`")

    def __len__(self) -> int:
        return len(self.gene_ids)

    def add(self, gene_ids: Texts, symbols: Texts, biotypes: Texts) -> np.ndarray[Any, np.dtype[np.int32]]:
        """Return the genes' numbers; new ones are added at the end, unknown symbols are filled in."""
        numbers = np.empty(len(gene_ids), np.int32)
        for i, (gene, symbol, biotype) in enumerate(zip(gene_ids, symbols, biotypes, strict=True)):
            number = self._number.setdefault(gene, len(self.gene_ids))
            if number == len(self.gene_ids):
                self.gene_ids.append(gene)
                self.symbols.append(symbol)
                self.biotypes.append(biotype)
            else:
                self.symbols[number] = self.symbols[number] or symbol
                self.biotypes[number] = self.biotypes[number] or biotype
            numbers[i] = number
        return numbers

    def hashes(self) -> np.ndarray[Any, np.dtype[np.uint64]]:
        """Return XXH3-64 of each id: uint64 [genes]."""
        return np.array([xxhash.xxh3_64_intdigest(gene.encode()) for gene in self.gene_ids], np.uint64)

    @classmethod
    def read(cls, path: Path) -> "GeneTable":
        """Read a genes-<generation>.parquet."""
        try:
            table = pq.read_table(path).to_pydict()
            return cls(table["gene_id"], table["symbol"], table["biotype"])
        except (OSError, KeyError, pa.ArrowInvalid) as error:
            raise DataError(f"{path}: cannot be read ({error}); restore it or convert again") from None

    def write(self, path: Path) -> None:
        """Write the table, whole or not at all."""
        columns = {"gene_id": self.gene_ids, "symbol": self.symbols, "biotype": self.biotypes}
        table = pa.table({name: pa.array(values, pa.string()) for name, values in columns.items()})
        temporary = path.with_name(path.name + TEMPORARY)
        pq.write_table(table, temporary, compression="zstd")
        flush_file(temporary)
        move_into_place(temporary, path)


def symbol_map(pairs: Sequence[tuple[Texts, Texts]]) -> dict[str, str]:
    """Return symbol → id from (ids, symbols) of several tables, for the symbols with one id in all of them."""
    found: dict[str, str | None] = {}
    for ids, symbols in pairs:
        for gene, symbol in zip(ids, symbols, strict=True):
            if symbol and _ENSEMBL.fullmatch(gene) and found.setdefault(symbol, gene) != gene:
                found[symbol] = None
    return {symbol: gene for symbol, gene in found.items() if gene is not None}
