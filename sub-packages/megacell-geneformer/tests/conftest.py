# SPDX-License-Identifier: Apache-2.0
"""Real cells and published dictionaries, and a small store in memory for what real files do not show."""

import os
import sys
from hashlib import blake2b
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from hypothesis import settings

sys.path.insert(0, str(Path(__file__).parent))  # hugging.py

settings.register_profile("megacell", deadline=None)  # a first example may have to wait for the compiler
settings.load_profile("megacell")

DATA = Path(os.environ.get("MEGACELL_TEST_DATA") or Path(__file__).parents[4] / "shared" / "data")
PARTS = {
    "tokens": "token_dictionary_{}.pkl",
    "medians": "gene_median_dictionary_{}.pkl",
    "gene_ids": "ensembl_mapping_dict_{}.pkl",
    "symbols": "gene_name_id_dict_{}.pkl",
}
EDITIONS = {"V1": "gc30M", "V2": "gc104M"}


class StoreInMemory:
    """What the package asks of a `CellStore`, over a matrix: any donors, sources and panels, no files."""

    def __init__(
        self, counts, gene_ids=None, symbols=None, biotypes=None, donors=None, sources=None, subsets=(), normalised=()
    ):
        self.matrix = sp.csr_matrix(counts, dtype=np.float32)
        self.matrix.sort_indices()
        cells, genes = self.matrix.shape
        self.path, self.generation, self.digest = (
            Path("made-up"),
            1,
            blake2b(self.matrix.data.tobytes()).hexdigest()[:16],
        )
        self.gene_ids = np.array([f"ENSG{g:011d}" for g in range(genes)] if gene_ids is None else gene_ids, object)
        self.symbols = np.array([""] * genes if symbols is None else symbols, object)
        self.biotypes = np.array([""] * genes if biotypes is None else biotypes, object)
        names = ["a.h5ad"] * cells if sources is None else sources
        codes, seen = pd.factorize(np.asarray(names, object))
        self.source_of = codes.astype(np.uint32)
        kind = {True: "length-normalised", False: "umi"}
        self.sources = [
            SimpleNamespace(name=n, subset=n in subsets, kind=kind[n in normalised], hash=f"of {n}") for n in seen
        ]
        self.obs = pd.DataFrame({"source": names})
        if donors is not None:
            self.obs["donor_id"] = pd.Categorical(donors)
        self.obs_columns = list(self.obs.columns)
        self.cell_hash = np.array(
            [int(blake2b(r.indices.tobytes() + r.data.tobytes(), digest_size=8).hexdigest(), 16) for r in self.matrix],
            np.uint64,
        )

    def __len__(self):
        return self.matrix.shape[0]

    def obs_column(self, name):
        return self.obs[name]

    def obs_slice(self, columns=None, start=0, stop=None):
        frame = self.obs[self.obs_columns if columns is None else list(columns)].iloc[start:stop]
        return frame.set_axis(range(start, start + len(frame)))

    def gather(self, cells, empty=None):
        block = self.matrix[np.asarray(cells)]
        block.sort_indices()
        return block.indptr.astype(np.int64), block.indices.astype(np.uint16), block.data


@pytest.fixture(scope="session")
def data():
    """The folder of real cells and published dictionaries."""
    if not DATA.is_dir():
        pytest.skip(f"no test data at {DATA}: set MEGACELL_TEST_DATA to the folder that holds cells/ and geneformer/")
    return DATA


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


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    """A cache of each test's own."""
    path = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("MEGACELL_CACHE", str(path))
    return path


@pytest.fixture(scope="session")
def made_up():
    """The class of stores in memory."""
    return StoreInMemory


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
    from megacell.training.nn.weights import initialise

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
