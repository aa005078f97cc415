# SPDX-License-Identifier: Apache-2.0
"""How names of genes are compared: ids without versions, case set aside, ambiguous names left out."""

import re
from collections.abc import Sequence

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
