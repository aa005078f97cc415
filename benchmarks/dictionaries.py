# SPDX-License-Identifier: Apache-2.0
"""Geneformer's published dictionaries, by the folder that holds them."""

from pathlib import Path

from megacell.geneformer import Vocabulary
from megacell.geneformer.vocabulary.geneformer_dictionaries import import_geneformer

TOKENS_AND_MEDIANS = ("token_dictionary", "gene_median_dictionary")
WITH_NAMES = (*TOKENS_AND_MEDIANS, "ensembl_mapping_dict", "gene_name_id_dict")


def dictionary_paths(folder: Path, names: tuple[str, ...] = TOKENS_AND_MEDIANS) -> list[Path]:
    """Return the pickles of a folder, in the order of ``names``; exit if one is not there."""
    found = [next(folder.glob(f"{name}*.pkl"), None) for name in names]
    absent = [name for name, path in zip(names, found, strict=True) if path is None]
    if absent:
        raise SystemExit(f"{folder}: has no {', '.join(f'{name}*.pkl' for name in absent)}; give a folder that has")
    return [path for path in found if path]


def published_vocabulary(folder: Path, names: tuple[str, ...] = TOKENS_AND_MEDIANS) -> Vocabulary:
    """Return the vocabulary that a folder's pickles make."""
    tokens, medians, *rest = dictionary_paths(folder, names)
    gene_ids, symbols = rest or (None, None)
    return import_geneformer(tokens, medians, gene_ids, symbols)
