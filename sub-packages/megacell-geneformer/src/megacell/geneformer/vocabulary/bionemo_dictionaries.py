# SPDX-License-Identifier: Apache-2.0
"""BioNeMo's dictionaries, known by their content: a list of tokens whose first five are special, and medians as JSON.

A line a token, the line's number its token, as BioNeMo 1 writes it, or as JSON under "vocab", as BioNeMo 2 does.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np

from megacell.core.errors import DataError
from megacell.geneformer.vocabulary.vocabulary import MOST_TOKENS, Vocabulary

NAMES = {"[CLS]": "cls", "[MASK]": "mask", "[PAD]": "pad", "[SEP]": None, "[UKW]": None}  # in order; two are unused
GENES_OF_V1 = "23f28dadb488ada362a02f7402e8b525712fb39d0183bda672fffee6c95d2ca7"  # SHA-256 of their sorted ids
MAX_LENGTH = 2048
NO_MEDIAN = 1.0  # what BioNeMo divides by where a gene has none


def is_bionemo(tokens: Path) -> bool:
    """Return whether a file of tokens is one of BioNeMo's, by its first bytes; Geneformer's are pickles."""
    try:
        with tokens.open("rb") as file:
            return file.read(1) in (b"[", b"{")
    except OSError:
        return False


def import_bionemo(tokens: Path, medians: Path, name: str | None = None) -> Vocabulary:
    """Make a vocabulary from BioNeMo's ``geneformer.vocab`` and ``medians.json``.

    Raises
    ------
    DataError
        A file holds something else, or the two are no pair.
    """
    contents = []
    for path in (tokens, medians):
        try:
            contents.append(path.read_bytes())
        except OSError as error:
            raise DataError(f"{path}: {error.strerror}; give one of BioNeMo's dictionaries") from None
    return make_vocabulary(contents[0], contents[1], str(tokens), str(medians), name)


def make_vocabulary(
    tokens: bytes, medians: bytes, tokens_place: str, medians_place: str, name: str | None = None
) -> Vocabulary:
    """Make a vocabulary from the two files' contents; `import_bionemo` tells what is raised."""
    token_of = read_tokens(tokens, tokens_place)
    median_of = _read_medians(medians, medians_place)
    specials = {ours: token_of[theirs] for theirs, ours in NAMES.items() if ours}
    genes = [gene for gene in token_of if gene not in NAMES]
    known = sum(gene in median_of for gene in genes)
    if 2 * known < len(genes):
        raise DataError(
            f"{medians_place}: has medians of {known:,} of the {len(genes):,} genes of {tokens_place}; they are no pair"
        )
    return Vocabulary(
        name=name or ("bionemo-geneformer" if _print(genes) == GENES_OF_V1 else "bionemo"),
        gene_ids=np.array(genes, object),
        symbols=np.array([""] * len(genes), object),
        tokens=np.array([token_of[gene] for gene in genes], np.int32),
        medians=np.array([median_of.get(gene, NO_MEDIAN) for gene in genes]),
        specials=specials,
        prefix=(specials["cls"],),
        suffix=(),
        max_length=MAX_LENGTH,
        provenance={"made": "imported", "content": {"tokens": _hash(tokens), "medians": _hash(medians)}},
    )


def read_tokens(content: bytes, place: str) -> dict[str, int]:
    """Return the token of each gene and special.

    Raises
    ------
    DataError
        It does not begin with BioNeMo's five special tokens, or a token or gene stands twice.
    """
    try:
        text = content.decode()
        if text.startswith("{"):
            found = json.loads(text)["vocab"]
        else:
            lines = text.splitlines()
            found = {line.strip(): number for number, line in enumerate(lines)}
            if len(found) != len(lines):
                raise ValueError("a line stands twice")
        fine = all(type(token) is int and 0 <= token < MOST_TOKENS for token in found.values())
        fine = fine and len(set(found.values())) == len(found)
        if not fine or [found.get(special) for special in NAMES] != list(range(len(NAMES))):
            raise ValueError(f"the first tokens are not {' '.join(NAMES)}")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DataError(f"{place}: not BioNeMo's list of tokens ({error}); give geneformer.vocab") from None
    return dict(found)


def _read_medians(content: bytes, place: str) -> dict[str, float]:
    try:
        found: Any = json.loads(content)
        return {str(gene): float(median) for gene, median in found.items()}
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise DataError(f"{place}: not BioNeMo's medians ({error}); give medians.json") from None


def _print(genes: list[str]) -> str:
    return _hash("\n".join(sorted(genes)).encode())


def _hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
