# SPDX-License-Identifier: Apache-2.0
"""The same cells through Geneformer's own tokenizer, and our tokens through the way its training scripts load theirs.

Needs an interpreter that has helical's copy of the tokenizer, datasets and transformers (benchmarks/README.md tells how
to make it), named by $MEGACELL_TOKENIZER_PYTHON.
"""

import json
import os
import subprocess
from itertools import pairwise
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

from megacell.geneformer import rank_encode
from megacell.geneformer.tokens.tokenize import tokenize
from megacell.geneformer.vocabulary.geneformer_dictionaries import import_geneformer, read_dictionary
from megacell.store import CellStore, convert

pytestmark = pytest.mark.exhaustive
TOKENIZER = Path(__file__).parents[1] / "benchmarks" / "run_geneformer.py"
PARTS = ("token_dictionary", "gene_median_dictionary", "ensembl_mapping_dict", "gene_name_id_dict")


@pytest.fixture(scope="module")
def python() -> str:
    """The interpreter that has the peers."""
    found = os.environ.get("MEGACELL_TOKENIZER_PYTHON")
    if not found:
        pytest.skip("no tokenizer at hand: set MEGACELL_TOKENIZER_PYTHON to an interpreter that has helical")
    return found


@pytest.fixture(scope="module")
def data() -> Path:
    """The folder of real cells and published dictionaries."""
    folder = Path(os.environ.get("MEGACELL_TEST_DATA", Path(__file__).parents[2] / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no test data at {folder}: set MEGACELL_TEST_DATA to it")
    return folder


def dictionaries(data: Path, edition: str) -> list[Path]:
    return [next((data / "geneformer" / edition).glob(f"{part}*.pkl")) for part in PARTS]


def said(*command: object) -> str:
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1]


@pytest.mark.parametrize("edition", ["V1", "V2"])
@pytest.mark.parametrize("name", ["pbmc4k_a", "pbmc4k_b"])
def test_geneformers_tokenizer_gives_the_same_tokens_of_every_real_cell(name, edition, python, data, tmp_path):
    adata = ad.read_h5ad(data / "cells" / f"{name}.h5ad")
    counts, var = (adata.X, adata.var) if adata.raw is None else (adata.raw.X, adata.raw.var)
    counts, ids = sp.csr_matrix(counts), np.asarray(var.get("ensembl_id", var.index), object).astype(str)
    names = pd.DataFrame({"ensembl_id": ids}, index=ids)
    ad.AnnData(counts.astype(np.float64), var=names).write_h5ad(tmp_path / "cells.h5ad")
    paths = dictionaries(data, edition)
    said(python, "-W", "ignore", TOKENIZER, tmp_path / "cells.h5ad", edition, *paths[:3], tmp_path, "float64")
    theirs = np.load(tmp_path / "tokens.npz")
    tokens, cu_lengths = rank_encode(counts, ids, import_geneformer(*paths))
    assert theirs["lengths"].tolist() == np.diff(cu_lengths).tolist()
    differ = [i for i, (a, b) in enumerate(pairwise(cu_lengths)) if (tokens[a:b] != theirs["tokens"][a:b]).any()]
    assert differ == []


TRAIN = """
import json, sys
from datasets import load_from_disk
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import BertConfig, BertForMaskedLM, DataCollatorForLanguageModeling, PreTrainedTokenizerFast
from transformers import Trainer, TrainingArguments

folder, tokens, out = sys.argv[1:]
cells = load_from_disk(folder)
vocabulary = json.load(open(tokens))
words = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel(vocabulary, unk_token="<pad>")),
                                pad_token="<pad>", mask_token="<mask>")
collator = DataCollatorForLanguageModeling(words, mlm=True, mlm_probability=0.15)
masked = collator([{"input_ids": own} for own in cells[:4]["input_ids"]])
config = BertConfig(vocab_size=len(vocabulary), hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
                    intermediate_size=32, max_position_embeddings=4096, pad_token_id=vocabulary["<pad>"])
arguments = TrainingArguments(out, max_steps=2, per_device_train_batch_size=2, group_by_length=True, use_cpu=True,
                              length_column_name="length", report_to=[], save_strategy="no", disable_tqdm=True)
trainer = Trainer(BertForMaskedLM(config), arguments, data_collator=collator, train_dataset=cells)
cells.save_to_disk(out + "/again")
print(json.dumps({
    "rows": len(cells), "columns": cells.column_names, "length": cells["length"][:],
    "input_ids": [cells[i]["input_ids"] for i in (0, 700, len(cells) - 1)], "cell_type": cells["cell_type"][:],
    "shape": list(masked["input_ids"].shape), "masked": int((masked["labels"] != -100).sum()),
    "steps": trainer.train().global_step, "again": load_from_disk(out + "/again")["length"][:] == cells["length"][:],
}))
"""


def test_geneformers_training_scripts_load_what_tokenize_wrote(python, data, tmp_path):
    """As its pretraining does: load_from_disk, batches of like length, masking by the collator, the Trainer."""
    convert(data / "cells", tmp_path / "store")
    store, paths = CellStore.open(tmp_path / "store"), dictionaries(data, "V2")
    vocabulary = import_geneformer(*paths)
    tokenize(store, vocabulary, tmp_path / "tokens", cells_a_file=1000)
    (words := tmp_path / "words.json").write_text(json.dumps(read_dictionary(paths[0], int)))
    found = json.loads(said(python, "-W", "ignore", "-c", TRAIN, tmp_path / "tokens", words, tmp_path / "run"))
    tokens, cu_lengths = rank_encode(store.rows(slice(None)), store.gene_ids, vocabulary)
    lengths = np.diff(cu_lengths)
    assert found["rows"] == len(store) == (lengths > 0).sum()
    assert found["columns"][:2] == ["input_ids", "length"]
    assert set(store.obs_columns) < set(found["columns"])
    assert found["length"] == lengths.tolist()
    assert found["input_ids"] == [tokens[cu_lengths[i] : cu_lengths[i + 1]].tolist() for i in (0, 700, len(store) - 1)]
    kinds = store.obs["cell_type"].astype(object)
    assert found["cell_type"] == kinds.where(kinds.notna(), None).tolist()
    assert found["shape"] == [4, lengths[:4].max()]
    assert 0.1 < found["masked"] / lengths[:4].sum() < 0.2
    assert found["steps"] == 2
    assert found["again"]
