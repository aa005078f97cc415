# SPDX-License-Identifier: Apache-2.0
"""How names of genes are compared: ids without versions, case set aside, ambiguous names left out."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

ENSEMBL_ID = re.compile(r"ENS[A-Z]*\d{11}")
ENSEMBL_VERSION = r"^(ENS[A-Z]*\d{11})\.\d+$"  # only real ids lose a version: symbols such as AC000123.1 keep theirs


def clean_ids(gene_ids: Sequence[str] | np.ndarray) -> np.ndarray:
    """Return gene ids, object [n], without surrounding space and without the version of an Ensembl id."""
    series = pd.Series(np.asarray(gene_ids, dtype=object), dtype=object).astype(str).str.strip()
    return series.str.replace(ENSEMBL_VERSION, r"\1", regex=True).to_numpy(object)


def is_ensembl(gene_ids: np.ndarray) -> np.ndarray:
    """Return which of the ids are Ensembl gene ids, bool [n]."""
    return pd.Series(gene_ids, dtype=object).str.fullmatch(ENSEMBL_ID.pattern).to_numpy(bool)


def upper(names: Sequence[str] | np.ndarray) -> pd.Index:
    """Return the names in upper case, without surrounding space."""
    return pd.Index(pd.Series(np.asarray(names, dtype=object), dtype=object).str.strip().str.upper(), dtype=object)


def unambiguous(rows: pd.Series) -> pd.Series:
    """Return the rows whose name (the index) stands once."""
    return rows[~rows.index.duplicated(keep=False)]


@dataclass(frozen=True, eq=False)
class Genes:
    """What genes are called, gene by gene.

    Attributes
    ----------
    ids, symbols, biotypes : np.ndarray, object str [G]
        Symbols and biotypes are "" where unknown.
    """

    ids: np.ndarray
    symbols: np.ndarray
    biotypes: np.ndarray

    @classmethod
    def union(cls, parts: Sequence["Genes"]) -> tuple["Genes", list[np.ndarray]]:
        """Number all genes of the parts by ascending id.

        A gene has the symbol and the biotype that a part gives it; of several, the first in alphabetical order, so
        that the order of the parts does not matter.

        Returns
        -------
        genes : Genes
        numbers : list of int64 array
            Of each part's genes.
        """
        ids, all_numbers = np.unique(np.concatenate([part.ids for part in parts]), return_inverse=True)
        numbers = np.split(all_numbers, np.cumsum([len(part.ids) for part in parts])[:-1])
        symbols, biotypes = np.full(len(ids), "", object), np.full(len(ids), "", object)
        for part, own in zip(parts, numbers, strict=True):
            for names, given in ((symbols, part.symbols), (biotypes, part.biotypes)):
                better = (given != "") & ((names[own] == "") | (given < names[own]))
                names[own[better]] = given[better]
        return cls(ids, symbols, biotypes), numbers
