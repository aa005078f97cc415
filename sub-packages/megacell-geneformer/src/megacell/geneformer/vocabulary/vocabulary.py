# SPDX-License-Identifier: Apache-2.0
"""The vocabulary: which gene is which token, its median, the special tokens. A small directory, checked when opened."""

import hashlib
import json
import logging
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from megacell.core import lock
from megacell.core.errors import DataError, UsageError
from megacell.core.files import TEMPORARY, flush_file, move_into_place
from megacell.geneformer.vocabulary.gene_names import clean_ids, is_ensembl, unambiguous, upper
from megacell.geneformer.vocabulary.tables import read_table, texts
from megacell.training.foreign.plain import check_shape, read_json

FORMAT, VERSION = "megacell-vocabulary", 1
FILES = ("vocabulary.json", "genes.parquet", "aliases.parquet")
SPECIALS = ("pad", "mask", "cls", "eos")
MOST_TOKENS = MOST_LENGTH = 1 << 20  # rows of an embedding, and tokens of a cell: tables are made of as many
MOST_ALIASES = 1 << 22
LARGEST = 1 << 24  # bytes of vocabulary.json
_META = {"version": int, "name": str, "specials": {"*": int}, "prefix": [int], "suffix": [int], "max_length": int,
         "provenance": dict, "sha256": str}  # fmt: skip
_GENES = {"gene_id": pa.string(), "symbol": pa.string(), "token": pa.int32(), "median": pa.float64()}
_ALIASES = {"alias": pa.string(), "gene_id": pa.string()}
LEAST_COVERAGE = 0.25  # share of the vocabulary's genes that a file has to measure
log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Vocabulary:
    """Genes, tokens and medians (G genes), in the order of ``gene_ids``.

    Attributes
    ----------
    name : str
    gene_ids, symbols : np.ndarray, object str [G]
        ``symbols`` is "" where unknown.
    tokens : np.ndarray, int32 [G]
    medians : np.ndarray, float64 [G]
        Non-zero median of count / cell total x 10,000 over the cells the vocabulary was made from.
    specials : dict of str to int
        Tokens of "pad" and "mask", and where there are any of "cls" and "eos".
    prefix, suffix : tuple of int
        Specials before and after each cell.
    max_length : int
        Longest input in tokens, specials included.
    aliases : dict of str to str
        Other ids and names of genes, upper case, to gene ids of this vocabulary.
    provenance : dict
        What the vocabulary was made from, in JSON's types.

    Raises
    ------
    DataError
        Any part does not fit the others.
    """

    name: str
    gene_ids: np.ndarray
    symbols: np.ndarray
    tokens: np.ndarray
    medians: np.ndarray
    specials: dict[str, int]
    prefix: tuple[int, ...]
    suffix: tuple[int, ...]
    max_length: int
    aliases: Mapping[str, str] = field(default_factory=dict)
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for fault in _faults(self):
            raise DataError(f"vocabulary {self.name}: {fault}")

    @classmethod
    def open(cls, path: str | Path) -> "Vocabulary":
        """Read a vocabulary's directory and check it against its hash.

        Raises
        ------
        DataError
            No vocabulary there, a newer format, or a file that has changed since it was written.
        """
        path = Path(path)
        for name in FILES:
            if not (path / name).is_file():
                make = "make one with `megacell vocabulary build` or `import`"
                raise DataError(f"{path}: not a vocabulary ({name} is missing); {make}")
        try:
            meta = read_json(path / "vocabulary.json", LARGEST)
            if not isinstance(meta, dict) or meta.get("format") != FORMAT:
                raise DataError(f"{path}: not a vocabulary; make one with `megacell vocabulary build` or `import`")
            if meta["version"] > VERSION:
                raise DataError(
                    f"{path}: version {meta['version']} is newer than this program reads ({VERSION}); update it"
                )
            check_shape(meta, _META)
            genes = read_table(path / "genes.parquet", _GENES, MOST_TOKENS)
            aliases = read_table(path / "aliases.parquet", _ALIASES, MOST_ALIASES)
            vocabulary = cls(
                name=meta["name"],
                gene_ids=texts(genes["gene_id"]).to_numpy(zero_copy_only=False),
                symbols=texts(genes["symbol"]).to_numpy(zero_copy_only=False),
                tokens=genes["token"].to_numpy(),
                medians=genes["median"].to_numpy(),
                specials=meta["specials"],
                prefix=tuple(meta["prefix"]),
                suffix=tuple(meta["suffix"]),
                max_length=meta["max_length"],
                aliases=dict(zip(*(texts(aliases[name]).to_pylist() for name in _ALIASES), strict=True)),
                provenance=meta["provenance"],
            )
            written = meta["sha256"]
        except (ValueError, KeyError, TypeError, AttributeError, OSError, pa.ArrowException) as error:
            raise DataError(f"{path}: a broken vocabulary ({error}); make it again") from None
        if vocabulary.hash != written:
            raise DataError(f"{path}: a file has changed since the vocabulary was written; make it again")
        return vocabulary

    def save(self, path: str | Path, beside: Callable[[Path], None] | None = None) -> None:
        """Write the vocabulary as a new directory: all of it, or nothing.

        Parameters
        ----------
        path : str or Path
        beside : callable, optional
            Writes further files into the directory that it is given.

        Raises
        ------
        UsageError
            ``path`` exists.
        DataError
            Another process is writing it.
        """
        path = Path(path)
        refuse_existing(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        with lock.held(lock.beside(path), f"{path}: another process is writing it"):
            refuse_existing(path)  # again: the other one may have ended between
            self._write(path, beside)

    def _write(self, path: Path, beside: Callable[[Path], None] | None) -> None:
        """Write the directory beside its place, and give it its name."""
        work = path.parent / f".{path.name}{TEMPORARY}"
        try:
            shutil.rmtree(work, ignore_errors=True)  # of who was killed
            work.mkdir()
            meta = {"format": FORMAT, "version": VERSION, **self._meta(), "sha256": self.hash}
            (work / "vocabulary.json").write_text(json.dumps(meta, indent=1, sort_keys=True) + "\n", encoding="utf-8")
            pq.write_table(self._genes(), work / "genes.parquet")
            pq.write_table(self._aliases(), work / "aliases.parquet")
            if beside:
                beside(work)
            for file in work.iterdir():
                flush_file(file)
            move_into_place(work, path)
        finally:
            shutil.rmtree(work, ignore_errors=True)

    def for_bionemo(self) -> "Vocabulary":
        """Return this vocabulary for cells as BioNeMo's Geneformer lays them out: cls in front, 2,048 tokens.

        A cls token that is lacking (Geneformer's V1) becomes the last one.
        """
        specials = {**self.specials, "cls": self.specials.get("cls", self.size)}
        return replace(
            self, name=f"{self.name}-bionemo", specials=specials, prefix=(specials["cls"],), suffix=(), max_length=2048
        )

    def _meta(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "specials": self.specials,
            "prefix": list(self.prefix),
            "suffix": list(self.suffix),
            "max_length": self.max_length,
            "provenance": dict(self.provenance),
        }

    def _genes(self) -> pa.Table:
        columns = {"gene_id": self.gene_ids, "symbol": self.symbols, "token": self.tokens, "median": self.medians}
        return pa.table({name: pa.array(columns[name], _GENES[name]) for name in columns})

    def _aliases(self) -> pa.Table:
        names = sorted(self.aliases)
        targets = [self.aliases[name] for name in names]
        return pa.table({"alias": pa.array(names, pa.string()), "gene_id": pa.array(targets, pa.string())})

    @cached_property
    def hash(self) -> str:
        """SHA-256, hex, of all that the vocabulary holds, whatever the layout of its files."""
        names = sorted(self.aliases)
        texts = [self._meta(), list(self.gene_ids), list(self.symbols), names, [self.aliases[n] for n in names]]
        digest = hashlib.sha256(json.dumps(texts, sort_keys=True, separators=(",", ":")).encode())
        digest.update(self.tokens.astype("<i4").tobytes())
        digest.update(self.medians.astype("<f8").tobytes())
        return digest.hexdigest()

    @property
    def split(self) -> dict[str, Any] | None:
        """`SplitSettings` of the cells that the medians were taken from, as a dictionary; None if it was imported."""
        return self.provenance.get("split")

    @cached_property
    def size(self) -> int:
        """Rows of an embedding table for this vocabulary: largest token + 1."""
        return int(max(self.tokens.max(), *self.specials.values())) + 1

    @cached_property
    def gene_tokens(self) -> np.ndarray:
        """All tokens that are genes, int32 [G], ascending."""
        return np.sort(self.tokens)

    @cached_property
    def _rows_by_name(self) -> tuple[pd.Series, pd.Series]:
        """Row of each gene by its id, and by every other name: alias first, then symbol; ambiguous names left out."""
        rows = np.arange(len(self.gene_ids))
        ids = pd.Series(rows, index=pd.Index(self.gene_ids, dtype=object))
        upper_ids = unambiguous(pd.Series(rows, index=upper(self.gene_ids)))
        aliases = pd.Series(ids.reindex(list(self.aliases.values())).to_numpy(), index=list(self.aliases), dtype=int)
        named = self.symbols != ""
        symbols = unambiguous(pd.Series(rows[named], index=upper(self.symbols[named])))
        names = pd.concat([upper_ids, aliases, symbols])
        return ids, names[~names.index.duplicated()]

    def _rows_of(self, gene_ids: Sequence[str] | np.ndarray, symbols: Sequence[str] | np.ndarray | None) -> np.ndarray:
        """Return the row of each gene, int64 [n], -1 where unknown.

        An id counts as it stands, then upper-cased, then as an alias or symbol. A separate symbol decides only
        where one side has no Ensembl id: two Ensembl ids that differ are two genes, whatever they are called.
        """
        ids, names = self._rows_by_name
        given = clean_ids(gene_ids)
        rows = ids.reindex(given).fillna(-1).to_numpy(np.int64)
        rows = np.where(rows >= 0, rows, names.reindex(upper(given)).fillna(-1).to_numpy(np.int64))
        if symbols is not None:
            by_symbol = names.reindex(upper(symbols)).fillna(-1).to_numpy(np.int64)
            both = is_ensembl(given) & is_ensembl(self.gene_ids)[by_symbol]
            rows = np.where((rows < 0) & ~both, by_symbol, rows)
        return rows

    def tokens_of(
        self, gene_ids: Sequence[str] | np.ndarray, symbols: Sequence[str] | np.ndarray | None = None
    ) -> np.ndarray:
        """Return each gene's token, int32 [n], -1 where the vocabulary has none.

        Parameters
        ----------
        gene_ids : sequence of str [n]
            Ensembl ids, with or without a version, or symbols.
        symbols : sequence of str [n], optional
            Consulted where an id is unknown and no other Ensembl id contradicts; "" where unknown.
        """
        rows = self._rows_of(gene_ids, symbols)
        return np.where(rows >= 0, self.tokens[rows], -1).astype(np.int32)


def refuse_existing(path: Path) -> None:
    """Refuse to write where something is already.

    Raises
    ------
    UsageError
        ``path`` exists.
    """
    if path.exists() or path.is_symlink():
        lock.forget(lock.beside(path))  # of who was killed once it was written
        raise UsageError(f"{path}: exists; give another --out or remove it first")


def check_coverage(
    gene_ids: Sequence[str] | np.ndarray,
    symbols: Sequence[str] | np.ndarray | None,
    vocabulary: Vocabulary,
    place: str,
    allow: bool = False,
) -> float:
    """Return which share of the vocabulary's genes a file measures; refuse another dictionary's or species' file.

    Parameters
    ----------
    gene_ids, symbols : sequence of str [n]
        The genes that the file measures.
    vocabulary : Vocabulary
        For which the file is meant.
    place : str
        The file's name, for the message.
    allow : bool
        Let a file pass that measures under a quarter, with a line in the log.

    Raises
    ------
    DataError
        Under a quarter of the genes is measured; or genes match by name only after upper-casing (mouse symbols).
    """
    rows = vocabulary._rows_of(gene_ids, symbols)
    share = len(np.unique(rows[rows >= 0])) / len(vocabulary.gene_ids)
    if (foreign := _recased_share(clean_ids(gene_ids), symbols, rows, vocabulary)) > 0.5:
        raise DataError(
            f"{place}: {foreign:.0%} of the gene names fit vocabulary {vocabulary.name} only in another case "
            "(Gapdh, GAPDH): these are another species' genes; map them to orthologues, or use that species' vocabulary"
        )
    line = f"{place}: measures {share:.1%} of the {len(vocabulary.gene_ids)} genes of vocabulary {vocabulary.name}"
    if share < LEAST_COVERAGE and not allow:
        raise DataError(
            f"{line}: wrong dictionary, species or kind of gene id; a file of selected genes has to be allowed as such"
        )
    if share < LEAST_COVERAGE:
        log.warning("%s; allowed as a gene subset", line)
    return share


def _recased_share(
    gene_ids: np.ndarray, symbols: Sequence[str] | np.ndarray | None, rows: np.ndarray, vocabulary: Vocabulary
) -> float:
    """Return which share of the genes that match by name match only in another case (0 where few match by name)."""
    by_name = (rows >= 0) & ~is_ensembl(gene_ids)
    if by_name.sum() < 100:
        return 0.0
    names = (
        gene_ids[by_name]
        if symbols is None
        else np.where(np.asarray(symbols, object) != "", symbols, gene_ids)[by_name]
    )
    known = vocabulary.symbols[rows[by_name]]
    known = np.where(known == "", vocabulary.gene_ids[rows[by_name]], known)
    same = (names == known) | (names == upper(names))
    return float(1 - same.mean())


def _faults(v: Vocabulary) -> list[str]:
    """Return what is wrong with a vocabulary, nothing for a good one."""
    specials = set(v.specials.values())
    ids = pd.Index(v.gene_ids, dtype=object)
    checks = {
        "no genes": len(ids) > 0,
        "columns of different lengths": len({len(v.gene_ids), len(v.symbols), len(v.tokens), len(v.medians)}) == 1,
        "a gene id stands twice or is empty": ids.is_unique and "" not in ids,
        "a token stands twice": len(specials) == len(v.specials)
        and len({*v.tokens.tolist(), *specials}) == len(ids) + len(specials),
        "a negative token": min(v.tokens.min(initial=0), *specials, 0) >= 0,
        f"a token of {MOST_TOKENS:,} or more": max(v.tokens.max(initial=0), *specials, 0) < MOST_TOKENS,
        "a median that is not above zero": bool(np.all(np.isfinite(v.medians) & (v.medians > 0))),
        f"specials must be among {', '.join(SPECIALS)}, with pad and mask": {"pad", "mask"}
        <= set(v.specials)
        <= set(SPECIALS),
        "a prefix or suffix that is no special": {*v.prefix, *v.suffix} <= specials,
        "max_length leaves no room for a gene": v.max_length > len(v.prefix) + len(v.suffix),
        f"max_length is above {MOST_LENGTH:,}": v.max_length <= MOST_LENGTH,
        "an alias of an unknown gene": ids.isin(list(v.aliases.values())).sum() == len(set(v.aliases.values())),
    }
    return [fault for fault, good in checks.items() if not good]
