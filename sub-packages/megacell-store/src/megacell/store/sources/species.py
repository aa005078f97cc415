# SPDX-License-Identifier: Apache-2.0
"""Which species a file's cells are of: from ids, from what the file says, from how symbols are written."""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import pandas as pd

from megacell.core.errors import DataError

Texts = Sequence[str] | np.ndarray[Any, Any]
DEFAULT = "human"
_PREFIX = r"^ENS([A-Z]*)G\d{11}"
_OF_PREFIX = {"": "human", "MUS": "mouse", "RNO": "rat", "DAR": "zebrafish", "MMU": "macaque", "SSC": "pig"}
_OF_NAME = {
    "homo sapiens": "human",
    "human": "human",
    "ncbitaxon:9606": "human",
    "mus musculus": "mouse",
    "mouse": "mouse",
    "ncbitaxon:10090": "mouse",
    "rattus norvegicus": "rat",
    "ncbitaxon:10116": "rat",
    "danio rerio": "zebrafish",
    "ncbitaxon:7955": "zebrafish",
    "macaca mulatta": "macaque",
    "ncbitaxon:9544": "macaque",
}
_GENOME = r"^(GRCh3\d|hg19|hg38|GRCm3\d|mm9|mm10|mm39)_+"  # Cell Ranger's prefix where genomes are mixed
SPECIES_COLUMNS = ("organism", "organism_ontology_term_id", "organism_name", "species")
_LEAST = 0.01  # share of ids from which a second species is more than a stray feature


def settle_species(
    gene_ids: Texts, symbols: Texts, stated: Iterable[str], wanted: str | None, where: str
) -> tuple[str, str]:
    """Return a source's species and a note where it had to be assumed.

    Parameters
    ----------
    gene_ids : sequence of str [genes]
        Ensembl ids, or symbols where there are none.
    symbols : sequence of str [genes]
        "" where unknown.
    stated : iterable of str
        What the file itself says, as `species_of` finds it.
    wanted : str, optional
        The store's species, as the user or an earlier conversion named it; human unless given.
    where : str
        For messages.

    Raises
    ------
    DataError
        Several species, or another one than the store's.
    """
    expected = wanted or DEFAULT
    from_ids = _species_of_ids(gene_ids)
    if len(from_ids) > 1:
        found = " and ".join(sorted(from_ids))
        raise DataError(f"{where}: genes of {found} together; a store holds one species: split the file by species")
    from_file = {_OF_NAME.get(name.strip().lower(), name.strip().lower()) for name in stated if name.strip()}
    from_case = set() if from_ids or from_file else _species_of_symbols(symbols)
    found_all = from_ids | from_file | from_case
    if not found_all:
        return expected, f"species assumed to be {expected}"
    if found_all == {expected} or (wanted and expected in found_all and from_ids <= {expected}):
        return expected, ""
    evidence = [("gene ids say", from_ids), ("the file says", from_file), ("symbols are written as for", from_case)]
    words = ", ".join(f"{what} {' and '.join(sorted(names))}" for what, names in evidence if names)
    fix = f"put it into a store of its own: --species {next(iter(from_ids or found_all))}"
    raise DataError(f"{where}: {words}, but the store is of {expected} cells; {fix}")


def _species_of_ids(gene_ids: Texts) -> set[str]:
    names = pd.Series(gene_ids, dtype=object)
    genomes = set(names.str.extract(_GENOME, expand=False).dropna())
    prefixes = names.str.extract(_PREFIX, expand=False).dropna().value_counts()
    least = _LEAST * max(1, len(names))
    from_prefix = {_OF_PREFIX.get(str(p), f"ENS{p}") for p, n in prefixes.items() if n >= least}
    return from_prefix | {"human" if g.startswith(("GRCh", "hg")) else "mouse" for g in genomes}


def species_of(frame: pd.DataFrame) -> set[str]:
    """Return what organism columns of obs or var name; ids of the ontology and names alike."""
    columns = [column for column in SPECIES_COLUMNS if column in frame]
    return {str(name) for column in columns for name in frame[column].dropna().unique()}


def _species_of_symbols(symbols: Texts) -> set[str]:
    """Tell TP53 from Trp53; none where neither way of writing is in the majority."""
    letters = pd.Series(symbols, dtype=object).str.replace(r"[^A-Za-z]", "", regex=True)
    letters = letters[letters.str.len() >= 3]
    if letters.empty:
        return set()
    if letters.str.isupper().mean() > 0.5:
        return {"human"}
    return {"mouse"} if letters.str.fullmatch("[A-Z][a-z]+").mean() > 0.5 else set()
