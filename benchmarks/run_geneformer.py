# SPDX-License-Identifier: Apache-2.0
"""Geneformer's tokenizer as helical ships it, run by an interpreter that has it; prints its figures as JSON.

    PYTHON benchmarks/run_geneformer.py FILE.h5ad V1|V2 TOKENS MEDIANS ID_MAPPING OUT float32|float64

FILE has ``ensembl_id`` in var and no ``n_counts`` in obs, so that cells' totals are summed in the type given. OUT, a
folder, gets the dataset and ``tokens.npz``. Only the file that holds the tokenizer is imported, so helical can be
installed without what else it needs. ID_MAPPING may be "-", for a file in which several ids mean one gene: helical
2.2.0 stops at those.
"""

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import anndata
import numpy as np
from measuring import timed

NO_MAPPING = "-"


def tokenizer_class() -> Any:
    """Return helical's TranscriptomeTokenizer."""
    found = importlib.util.find_spec("helical")
    if found is None or not found.submodule_search_locations:
        sys.exit("helical is not installed here")
    place = Path(found.submodule_search_locations[0]) / "models" / "geneformer" / "geneformer_tokenizer.py"
    spec = importlib.util.spec_from_file_location("geneformer_tokenizer", place)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.TranscriptomeTokenizer


def main(file: str, edition: str, tokens: str, medians: str, mapping: str, out: str, dtype: str) -> dict[str, Any]:
    """Tokenize a file as helical does for an edition of Geneformer."""
    size, special = {"V1": (2048, False), "V2": (4096, True)}[edition]
    tokenizer = tokenizer_class()(
        model_input_size=size, special_token=special,
        gene_median_file=medians, token_dictionary_file=tokens,
        gene_mapping_file=None if mapping == NO_MAPPING else mapping,
    )  # fmt: skip
    made: dict[str, Any] = {}

    def rank() -> None:
        made["cells"], metadata = tokenizer.tokenize_anndata(made["data"])
        made["dataset"] = tokenizer.create_dataset(made["cells"], metadata)

    def load() -> None:
        made["data"] = anndata.read_h5ad(file)
        made["data"].X = made["data"].X.astype(dtype)

    loading, ranking = timed(load), timed(rank)
    saving = timed(lambda: made["dataset"].save_to_disk(str(Path(out) / "dataset")))
    lists = made["dataset"]["input_ids"]
    np.savez(Path(out) / "tokens.npz", tokens=np.concatenate(lists), lengths=np.array([len(own) for own in lists]))
    return {"cells": len(lists), "loading": loading, "ranking": ranking, "saving": saving}


if __name__ == "__main__":
    print(json.dumps(main(*sys.argv[1:])))
