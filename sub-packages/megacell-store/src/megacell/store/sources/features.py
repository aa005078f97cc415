# SPDX-License-Identifier: Apache-2.0
"""Genes: which of a file's features are genes, their ids found by content, and the store's union table."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from megacell.core.errors import DataError, UsageError
from megacell.store.format.gene_table import Texts

FEWEST = 10_000  # genes a source must have measured; fewer is a selection, which shifts medians
_ENSEMBL = r"^ENS[A-Z]*G\d{11}(\..*)?$"
_VERSION = r"^(ENS[A-Z]*\d{11})\..*$"
_SPIKE_IN = r"^ERCC-\d{5}$"
_ANTIBODY = r"_TotalSeq-?[A-D]?$|^(ADT|HTO)[-_]"  # names in use where no type is given
_MADE_UNIQUE = r"-\d+$"
_MAPPED = "id map"
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


def read_features(
    var: pd.DataFrame,
    where: str,
    gene_ids: str = "auto",
    other: pd.DataFrame | None = None,
    id_map: Mapping[str, str] | None = None,
) -> Features:
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
    id_map : mapping, optional
        Ids by the names that the file uses; names that it lacks stay as they are.

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
    if id_map:
        texts = _mapped(texts, gene_ids, id_map, notes)
        gene_ids = _MAPPED
    is_gene = _genes_only(var, texts["index"], where, other, notes)
    column = _most_ensembl(texts, is_gene) if gene_ids == "auto" else gene_ids
    symbols = _symbols(texts, column)
    named = _match(texts[column], _ENSEMBL)
    is_ensembl = bool(named[is_gene].mean() >= 0.5)
    ids = texts[column].copy() if is_ensembl or gene_ids != "auto" else symbols.copy()
    if is_ensembl:
        ids = np.asarray(pc.replace_substring_regex(pa.array(ids, pa.string()), _VERSION, r"\1"), object)
        nameless = is_gene & ~named
        ids[nameless] = np.where(symbols[nameless] != "", symbols[nameless], ids[nameless])
        if nameless.any():
            notes.append(f"{nameless.sum():,} genes without an Ensembl id go by their symbol")
    elif _match(ids[is_gene], r"^\d*$").mean() > 0.5:
        raise DataError(
            f"{where}: genes are numbered, not named; name the column that holds their ids: --gene-ids COLUMN"
        )
    if unnamed := int((is_gene & (ids == "")).sum()):
        notes.append(f"{unnamed:,} columns without a name dropped")
    is_gene &= ids != ""
    biotypes = next((texts[c] for c in _BIOTYPE_COLUMNS if c in texts), np.full(len(var), "", object))
    return _distinct(ids, symbols, biotypes, is_gene, "ensembl" if is_ensembl else "symbol", notes)


def read_id_map(path: Path) -> dict[str, str]:
    """Read a user's map: two columns, what files name a gene and its id, separated by comma or tab; no head needed.

    Raises
    ------
    UsageError
        It cannot be read.
    DataError
        A line without two fields, or a name with two ids.
    """
    try:
        lines = path.read_text("utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: cannot be read ({error}); give a CSV or TSV of two columns") from None
    found: dict[str, str] = {}
    for number, line in enumerate(lines, 1):
        fields = [text.strip().strip('"') for text in line.split("\t" if "\t" in line else ",")]
        if not line.strip():
            continue
        if len(fields) != 2 or not all(fields):
            raise DataError(f"{path}, line {number}: needs a name and an id; fix the line")
        if found.setdefault(fields[0], fields[1]) != fields[1]:
            raise DataError(f"{path}, line {number}: {fields[0]!r} has two ids; leave one out")
    return found


def _mapped(
    texts: dict[str, np.ndarray[Any, Any]], gene_ids: str, id_map: Mapping[str, str], notes: list[str]
) -> dict[str, np.ndarray[Any, Any]]:
    """Return the columns with one more: ids by the user's map, from the column named or that of most names in it."""
    known = pd.Series(id_map, dtype=object)
    column = gene_ids
    if gene_ids == "auto":
        column = max(texts, key=lambda name: int(pd.Index(texts[name]).isin(known.index).sum()))
    own = pd.Series(texts[column], dtype=object)
    found = own.map(known)
    notes.append(f"{int(found.notna().sum()):,} genes named by the id map, from {column}")
    return {**texts, _MAPPED: np.asarray(found.fillna(own), object)}


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
        bases = pc.replace_substring_regex(pa.array(distinct, pa.string()), _MADE_UNIQUE, "")
        ambiguous = int((_match(distinct, _MADE_UNIQUE) & pd.Index(np.asarray(bases, object)).isin(distinct)).sum())
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
        stated = pd.Series(_clean(other["feature_types"]), _clean(other.index))
        stated = stated[~stated.index.duplicated()]
        types = np.asarray(stated.reindex(names).fillna("Gene Expression"), object)
    if types is not None:
        is_gene = np.asarray(pd.Series(types).str.lower().isin(_GENE_TYPES))
        if not is_gene.any():
            kinds = ", ".join(sorted(set(types))[:5])
            raise DataError(
                f"{where}: no Gene Expression feature (feature_types: {kinds}); give a file with RNA counts"
            )
        for kind, n in pd.Series(types[~is_gene]).value_counts().items():
            notes.append(f"{n:,} {kind} features dropped")
    spike_in = _match(names, _SPIKE_IN)
    if "feature_biotype" in var:
        spike_in |= _clean(var["feature_biotype"]) == "spike-in"
    antibody = _match(names, _ANTIBODY)
    for kind, found in (("spike-in", spike_in), ("antibody", antibody)):
        if n := int((is_gene & found).sum()):
            notes.append(f"{n:,} {kind} features dropped (by name)")
        is_gene &= ~found
    if not is_gene.any():
        raise DataError(f"{where}: measures no genes; give a file with RNA counts")
    return is_gene


def _most_ensembl(texts: Mapping[str, np.ndarray[Any, Any]], is_gene: np.ndarray[Any, Any]) -> str:
    """Return the column with most Ensembl gene ids, the index where none has any."""
    share = {c: _match(ids[is_gene], _ENSEMBL).mean() for c, ids in texts.items()}
    return max(share, key=lambda c: share[c])  # the first of equals: the index stands first


def _symbols(texts: Mapping[str, np.ndarray[Any, Any]], id_column: str) -> np.ndarray[Any, Any]:
    """Return the symbols: a column known by its name, else the index unless that holds the ids."""
    if id_column != "index" and _match(texts["index"], r"^\d+$").mean() < 0.5:
        return texts["index"]
    named = next((texts[c] for c in _SYMBOL_COLUMNS if c in texts and c != id_column), None)
    if named is not None:
        return named
    has_ids = _match(texts["index"], _ENSEMBL).mean() >= 0.5
    return np.full(len(texts["index"]), "", object) if has_ids else texts["index"]


def _is_text(column: pd.Series) -> bool:
    values = column.cat.categories if isinstance(column.dtype, pd.CategoricalDtype) else column
    return bool(pd.api.types.is_object_dtype(values.dtype) or pd.api.types.is_string_dtype(values.dtype))


def _match(texts: np.ndarray[Any, Any], pattern: str) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """Return which texts hold a match of a regular expression: bool [n]."""
    found = pc.match_substring_regex(pa.array(texts, pa.string()), pattern)
    return np.asarray(found.to_numpy(zero_copy_only=False), bool)


def _clean(values: Any) -> np.ndarray[Any, Any]:
    """Return texts without outer blanks, "" where missing."""
    series = pd.Series(np.asarray(values, dtype=object))
    return np.asarray(series.where(series.notna(), "").astype(str).str.strip(), dtype=object)


def symbol_map(pairs: Sequence[tuple[Texts, Texts]]) -> "pd.Series[str]":
    """Return id by symbol from (ids, symbols) of several tables, for the symbols with one id in all of them."""
    ids = np.concatenate([np.asarray(own, object) for own, _ in pairs])
    symbols = np.concatenate([np.asarray(own, object) for _, own in pairs])
    known = pd.DataFrame({"id": ids, "symbol": symbols}, dtype=object)[(symbols != "") & _match(ids, _ENSEMBL)]
    known = known.drop_duplicates()
    known = known[~known["symbol"].duplicated(keep=False)]
    return pd.Series(known["id"].to_numpy(object), known["symbol"].to_numpy(object), dtype=object)
