# SPDX-License-Identifier: Apache-2.0
"""Geneformer as a model family on a Megacell store: vocabulary, rank value encoding, network, weights, embeddings."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megacell.geneformer.embedding.files import embed_file
    from megacell.geneformer.embedding.geneformer import Geneformer
    from megacell.geneformer.interchange.open import open_model
    from megacell.geneformer.model.geneformer_model import GeneformerModel
    from megacell.geneformer.tokens.lengths import token_lengths
    from megacell.geneformer.tokens.masking import MaskSettings
    from megacell.geneformer.tokens.packing import MicroBatch
    from megacell.geneformer.tokens.rank_encoder import RankEncoder, rank_encode
    from megacell.geneformer.tokens.stream import token_stream
    from megacell.geneformer.tokens.token_dataset import TokenFolder
    from megacell.geneformer.vocabulary.build import build_vocabulary
    from megacell.geneformer.vocabulary.geneformer_dictionaries import import_geneformer
    from megacell.geneformer.vocabulary.published import fetch_geneformer
    from megacell.geneformer.vocabulary.vocabulary import Vocabulary, check_coverage
    from megacell.store.sampling.batch_stream import BatchStream
    from megacell.store.sampling.cell_set import CellSet, choose_cells
    from megacell.store.sampling.order import BlockShuffled, Weighted
    from megacell.store.sampling.split import Split, SplitSettings, split_cells

_HOMES = {  # public name → module; imported when first asked for (PEP 562), so that importing the package costs nothing
    "BatchStream": "megacell.store.sampling.batch_stream",
    "BlockShuffled": "megacell.store.sampling.order",
    "CellSet": "megacell.store.sampling.cell_set",
    "Geneformer": "megacell.geneformer.embedding.geneformer",
    "GeneformerModel": "megacell.geneformer.model.geneformer_model",
    "MaskSettings": "megacell.geneformer.tokens.masking",
    "MicroBatch": "megacell.geneformer.tokens.packing",
    "RankEncoder": "megacell.geneformer.tokens.rank_encoder",
    "Split": "megacell.store.sampling.split",
    "SplitSettings": "megacell.store.sampling.split",
    "TokenFolder": "megacell.geneformer.tokens.token_dataset",
    "Vocabulary": "megacell.geneformer.vocabulary.vocabulary",
    "Weighted": "megacell.store.sampling.order",
    "build_vocabulary": "megacell.geneformer.vocabulary.build",
    "check_coverage": "megacell.geneformer.vocabulary.vocabulary",
    "choose_cells": "megacell.store.sampling.cell_set",
    "embed_file": "megacell.geneformer.embedding.files",
    "fetch_geneformer": "megacell.geneformer.vocabulary.published",
    "import_geneformer": "megacell.geneformer.vocabulary.geneformer_dictionaries",
    "open_model": "megacell.geneformer.interchange.open",
    "rank_encode": "megacell.geneformer.tokens.rank_encoder",
    "split_cells": "megacell.store.sampling.split",
    "token_lengths": "megacell.geneformer.tokens.lengths",
    "token_stream": "megacell.geneformer.tokens.stream",
}
__all__ = [
    "BatchStream",
    "BlockShuffled",
    "CellSet",
    "Geneformer",
    "GeneformerModel",
    "MaskSettings",
    "MicroBatch",
    "RankEncoder",
    "Split",
    "SplitSettings",
    "TokenFolder",
    "Vocabulary",
    "Weighted",
    "build_vocabulary",
    "check_coverage",
    "choose_cells",
    "embed_file",
    "fetch_geneformer",
    "import_geneformer",
    "open_model",
    "rank_encode",
    "split_cells",
    "token_lengths",
    "token_stream",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return __all__
