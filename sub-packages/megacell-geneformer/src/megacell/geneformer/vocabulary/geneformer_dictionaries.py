# SPDX-License-Identifier: Apache-2.0
"""Geneformer's published dictionaries, which are Python pickles: read without running anything, made a vocabulary."""

import hashlib
import io
import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from megacell.core.errors import DataError
from megacell.geneformer.vocabulary.vocabulary import MOST_TOKENS, Vocabulary
from megacell.training.foreign.pickled import check_pickle
from megacell.training.foreign.plain import SHOWN, shown

LARGEST = 1 << 24  # bytes of a dictionary; the published ones have up to 4 MB
CONTAINERS: dict[str, Any] = {"dict": dict, "list": list, "tuple": tuple, "set": set, "frozenset": frozenset}
NUMBER = re.compile(r"[iuf][1248]|b1")  # the dtype codes of whole, floating and truth values


class _Dtype:
    """Stands for ``numpy.dtype`` while unpickling: holds a number's code and byte order, and nothing else."""

    def __init__(self, code: str, *_: Any) -> None:
        if not isinstance(code, str) or not NUMBER.fullmatch(code):
            raise pickle.UnpicklingError(f"numpy dtype {shown(code)}")
        self.dtype = np.dtype(code)

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.dtype = self.dtype.newbyteorder(state[1])


def _scalar(kind: _Dtype, data: bytes) -> Any:
    """Stand for numpy's ``scalar``: a Python number from its bytes."""
    if not isinstance(kind, _Dtype) or not isinstance(data, bytes) or len(data) != kind.dtype.itemsize:
        raise pickle.UnpicklingError("a numpy scalar that is not a number")
    return np.frombuffer(data, kind.dtype)[0].item()


class _RestrictedUnpickler(pickle.Unpickler):
    """Admits built-in containers and numpy's numbers; refuses every other name before it is imported."""

    def find_class(self, module: str, name: str) -> Any:
        if module in ("builtins", "__builtin__") and name in CONTAINERS:
            return CONTAINERS[name]
        if module == "numpy" and name == "dtype":
            return _Dtype
        if module in ("numpy.core.multiarray", "numpy._core.multiarray") and name == "scalar":
            return _scalar
        raise pickle.UnpicklingError(f"{module}.{name}"[:SHOWN])


def _load(path: Path) -> Any:
    """Return what a pickle holds, of containers, texts and numbers, in memory and time that its size bounds."""
    if path.stat().st_size > LARGEST:
        raise DataError(
            f"{path}: has {path.stat().st_size:,} bytes, a dictionary {LARGEST:,} at most; take another file"
        )
    content = path.read_bytes()
    try:
        check_pickle(content)
        return _RestrictedUnpickler(io.BytesIO(content)).load()
    except pickle.UnpicklingError as error:
        raise DataError(
            f"{path}: refused: the pickle holds {error}; only containers, strings and numbers are read, "
            "so take the dictionary from where Geneformer publishes it"
        ) from None
    except (EOFError, AttributeError, IndexError, KeyError, TypeError, ValueError, MemoryError, OverflowError) as error:
        raise DataError(f"{path}: not a pickled dictionary, or a broken one ({error}); download it again") from None


def read_dictionary(path: str | Path, values: type[int] | type[float] | type[str]) -> dict[str, Any]:
    """Read one pickled dictionary of strings to whole numbers, numbers or strings.

    Parameters
    ----------
    path : path
        One of Geneformer's ``*_dict*.pkl`` files.
    values : int, float or str
        What the dictionary's values have to be; numpy numbers come back as Python's.

    Returns
    -------
    dict
        In the file's order.

    Raises
    ------
    DataError
        The file is absent, no pickle, holds anything but containers, strings and numbers (named), or
        not the dictionary that was asked for.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(f"{path}: no such file; give the path of a Geneformer dictionary (.pkl)")
    content = _load(path)
    kinds = (int, float) if values is float else (values,)
    if not isinstance(content, dict) or not content:
        raise DataError(f"{path}: holds a {type(content).__name__}, where a filled dictionary should be")
    for key, value in content.items():
        if not isinstance(key, str) or not isinstance(value, kinds) or isinstance(value, bool):
            raise DataError(
                f"{path}: entry {shown(key)}: {shown(value)} is not a string to {values.__name__}; "
                "is it another one of the dictionaries?"
            )
    return {key: values(value) for key, value in content.items()}


V1, V2 = "geneformer-v1", "geneformer-v2"
PUBLISHED = {  # SHA-256 of the content (`fingerprint`) of each dictionary: tokens, medians, ids, symbols
    "9227a0f363108c7ffe920f61f8e898df6e1f5886d70192d8f2494d3574438a99": V1,
    "8a73b3a506496e86ab133ca2a50db22dab09aa65a5fc7ca329bd019a77ec59e4": V1,
    "f578fc5bd8ea3f42695e89e3bf3270b70fa208c7320943d153138d08af0bf54c": V1,
    "caabdd3cc010da2fbdef43ee4af114f7d8a3c0fac24f52e913456470bac556d1": V1,
    "cd196025f75ed1c0f15685d28a5afce81689badfe5c3fda7bbd331610911977d": V2,
    "251b1b037df8c199083ab0a7dcf97bdd2a993aa9acd3062cda50c1789bc1b7de": V2,
    "e44445273c336802386e9bf517fb964a1424e4cb3a3aee1da77d023b96a2860b": V2,
    "bf9e89463fa8fc15d72a403d916e613190016365af589d9ba9e91688022858b5": V2,
}
MAX_LENGTHS = {False: 2048, True: 4096}  # without and with <cls> and <eos>: Geneformer's V1 and V2


def fingerprint(dictionary: Mapping[str, Any]) -> str:
    """Return the SHA-256, hex, of a dictionary's content, whatever its order and its pickle's protocol."""
    lines = (
        f"{key}\t{value.hex() if isinstance(value, float) else value}\n" for key, value in sorted(dictionary.items())
    )
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def import_geneformer(
    tokens: str | Path,
    medians: str | Path,
    gene_ids: str | Path | None = None,
    symbols: str | Path | None = None,
    name: str | None = None,
) -> Vocabulary:
    """Make a vocabulary from Geneformer's dictionaries.

    A token dictionary with ``<cls>`` and ``<eos>`` is of V2's kind: cells stand between them, within 4,096 tokens.
    One without is of V1's: no specials in the input, 2,048 tokens.

    Parameters
    ----------
    tokens : path
        ``token_dictionary*.pkl``: gene id or special to token.
    medians : path
        ``gene_median_dictionary*.pkl``: gene id to median.
    gene_ids : path, optional
        ``ensembl_mapping_dict*.pkl``: other ids and names to gene ids.
    symbols : path, optional
        ``gene_name_id_dict*.pkl``: symbol to gene id.
    name : str, optional
        "geneformer-v1" or "geneformer-v2" where the token dictionary is the published one, else "geneformer".

    Raises
    ------
    DataError
        A file holds something else, or belongs to another edition than the tokens.
    """
    paths = {
        "tokens": (tokens, int),
        "medians": (medians, float),
        "gene_ids": (gene_ids, str),
        "symbols": (symbols, str),
    }
    read = {part: read_dictionary(path, kind) for part, (path, kind) in paths.items() if path is not None}
    if odd := next((gene for gene, token in read["tokens"].items() if not 0 <= token < MOST_TOKENS), None):
        raise DataError(f"{tokens}: gives {shown(odd)} a token that is none of 0 to {MOST_TOKENS - 1:,}")
    prints = {part: fingerprint(content) for part, content in read.items()}
    edition = PUBLISHED.get(prints["tokens"])
    for part, printed in prints.items():
        other = PUBLISHED.get(printed)
        if edition and other and other != edition:
            raise DataError(
                f"{paths[part][0]}: belongs to {other}, but {tokens} to {edition}; take both from one edition"
            )
    token_of = {gene: token for gene, token in read["tokens"].items() if not gene.startswith("<")}
    specials = {gene.strip("<>"): token for gene, token in read["tokens"].items() if gene.startswith("<")}
    lacking = [gene for gene in token_of if gene not in read["medians"]]
    if lacking:
        raise DataError(
            f"{medians}: has no median for {len(lacking):,} genes of {tokens} ({lacking[0]}, …); they are no pair"
        )
    symbol_of = {gene: symbol for symbol, gene in read.get("symbols", {}).items()}
    surrounded = {"cls", "eos"} <= set(specials)
    return Vocabulary(
        name=name or edition or "geneformer",
        gene_ids=np.array(list(token_of), object),
        symbols=np.array([symbol_of.get(gene, "") for gene in token_of], object),
        tokens=np.array(list(token_of.values()), np.int32),
        medians=np.array([read["medians"][gene] for gene in token_of]),
        specials=specials,
        prefix=(specials["cls"],) if surrounded else (),
        suffix=(specials["eos"],) if surrounded else (),
        max_length=MAX_LENGTHS[surrounded],
        aliases={a.upper(): g for a, g in read.get("gene_ids", {}).items() if g in token_of and a.upper() != g},
        provenance={"made": "imported", "content": prints},
    )


def write_dictionaries(vocabulary: Vocabulary, folder: Path) -> None:
    """Write a vocabulary as the pickles that Geneformer's own tokenizer reads, into a folder that is there."""
    tokens = {f"<{name}>": token for name, token in vocabulary.specials.items()}
    tokens |= dict(zip(vocabulary.gene_ids.tolist(), vocabulary.tokens.tolist(), strict=True))
    named = {symbol: gene for symbol, gene in zip(vocabulary.symbols, vocabulary.gene_ids, strict=True) if symbol}
    itself = {gene: gene for gene in vocabulary.gene_ids.tolist()}
    contents: dict[str, dict[str, Any]] = {
        "token_dictionary.pkl": dict(sorted(tokens.items(), key=lambda item: item[1])),
        "gene_median_dictionary.pkl": dict(zip(vocabulary.gene_ids.tolist(), vocabulary.medians.tolist(), strict=True)),
        "gene_name_id_dict.pkl": named,
        "ensembl_mapping_dict.pkl": {**vocabulary.aliases, **itself},
    }
    for name, content in contents.items():
        (folder / name).write_bytes(pickle.dumps(content, protocol=4))
