# SPDX-License-Identifier: Apache-2.0
"""The genes of several stores or vocabularies under one numbering."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


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
