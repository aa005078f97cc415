# SPDX-License-Identifier: Apache-2.0
"""Geneformer-style pretraining on a Megacell store: vocabulary, rank value encoding, batches, model, training."""

import importlib
from typing import Any

_HOMES = {  # public name → module; imported when first asked for (PEP 562), so that importing the package costs nothing
    "BatchStream": "batches",
    "BlockShuffled": "order",
    "CellSet": "cell_sets",
    "Geneformer": "geneformer",
    "GeneformerModel": "training.module",
    "MaskSettings": "masking",
    "MicroBatch": "batches",
    "RankEncoder": "ranking",
    "Split": "split",
    "SplitSettings": "split",
    "TokenFolder": "token_folder",
    "Vocabulary": "vocabulary",
    "Weighted": "order",
    "build_vocabulary": "vocabulary_build",
    "check_coverage": "vocabulary",
    "choose_cells": "cell_sets",
    "embed_file": "embedding_file",
    "fetch_geneformer": "published",
    "import_geneformer": "geneformer_pickles",
    "open_model": "interchange.open",
    "rank_encode": "ranking",
    "split_cells": "split",
    "token_lengths": "lengths",
}
__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
