# SPDX-License-Identifier: Apache-2.0
"""Real cells and published dictionaries; vocabularies and models that are made up."""

import sys
from pathlib import Path

import numpy as np
import pytest
import scipy.sparse as sp

sys.path.insert(0, str(Path(__file__).parent))  # hugging.py

PARTS = {
    "tokens": "token_dictionary_{}.pkl",
    "medians": "gene_median_dictionary_{}.pkl",
    "gene_ids": "ensembl_mapping_dict_{}.pkl",
    "symbols": "gene_name_id_dict_{}.pkl",
}
EDITIONS = {"V1": "gc30M", "V2": "gc104M"}


@pytest.fixture(scope="session")
def dictionaries(data):
    """Paths of Geneformer's dictionaries: ``dictionaries["V1"]["tokens"]``."""
    return {
        edition: {part: data / "geneformer" / edition / name.format(suffix) for part, name in PARTS.items()}
        for edition, suffix in EDITIONS.items()
    }


@pytest.fixture(scope="session")
def published(dictionaries):
    """The vocabularies imported from them."""
    from megacell.geneformer.vocabulary.geneformer_dictionaries import import_geneformer

    return {edition: import_geneformer(**paths) for edition, paths in dictionaries.items()}


@pytest.fixture(scope="session")
def real_cells(data):
    """(counts CSR, gene ids) of each real file; symbols stand for ids in the last."""
    import anndata

    files = {}
    for name in ("pbmc4k_a", "pbmc4k_b", "pbmc5k_protein"):
        adata = anndata.read_h5ad(data / "cells" / f"{name}.h5ad")
        counts, var = (adata.raw.X, adata.raw.var) if adata.raw is not None else (adata.X, adata.var)
        ids = var.get("ensembl_id", var.index)
        files[name] = (sp.csr_matrix(counts), np.asarray(ids, object))
    return files


@pytest.fixture(scope="session")
def real_store(data, tmp_path_factory):
    """All real cells as a store."""
    from megacell.store import CellStore, convert

    path = tmp_path_factory.mktemp("real") / "store"
    convert(data / "cells", path)
    return CellStore.open(path)


@pytest.fixture(scope="session")
def vocabulary_for():
    """Make a vocabulary of n genes: ENSG00000000000 …, medians given or all different."""
    from megacell.geneformer.vocabulary.vocabulary import Vocabulary

    def make(genes=20, medians=None, specials=("pad", "mask", "cls", "eos"), max_length=64, **changes):
        tokens = {name: number for number, name in enumerate(specials)}
        given = {
            "name": "made-up",
            "gene_ids": np.array([f"ENSG{g:011d}" for g in range(genes)], object),
            "symbols": np.array([f"GENE{g}" for g in range(genes)], object),
            "tokens": np.arange(len(tokens), len(tokens) + genes, dtype=np.int32),
            "medians": np.linspace(0.5, 3.0, genes) if medians is None else np.asarray(medians, float),
            "specials": tokens,
            "prefix": tuple(tokens[s] for s in ("cls",) if s in tokens),
            "suffix": tuple(tokens[s] for s in ("eos",) if s in tokens),
            "max_length": max_length,
        }
        return Vocabulary(**{**given, **changes})

    return make


@pytest.fixture(scope="session")
def model_for():
    """Make an untrained model over a vocabulary; its weights are wide, so that states of different tokens differ."""
    from omegaconf import OmegaConf

    from megacell.geneformer.model.config import ModelConfig
    from megacell.geneformer.model.geneformer_model import GeneformerModel
    from megacell.geneformer.model.initial_weights import initialise

    def make(vocabulary, provenance=None, **sizes):
        network = {"layers": 3, "hidden": 32, "ffn": 64, "heads": 4, "max_length": vocabulary.max_length,
                   "vocabulary_size": vocabulary.size, "norm": "pre", "activation": "gelu", "tied_head": True,
                   "hidden_dropout": 0.1, "attention_dropout": 0.1, "layernorm_epsilon": 1e-12, "init_std": 0.3,
                   "scaled_init": True, **sizes}  # fmt: skip
        cfg = {"network": network, "precision": "fp32", "vocabulary": vocabulary.hash, "provenance": provenance or {}}
        model = GeneformerModel(OmegaConf.create(cfg))
        initialise(model.bert, ModelConfig.of(network), seed=5)
        model.vocabulary = vocabulary
        return model.eval()

    return make
