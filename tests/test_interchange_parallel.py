# SPDX-License-Identifier: Apache-2.0
"""A published model computes over tensor parallel ranks what `transformers` does in one process."""

import numpy as np
import pytest
import torch
from hugging import BOTH, VOCABULARY, cells_of, theirs
from interchange_jobs import computed, restored
from restore import logits

from megacell.geneformer.interchange.open import open_model
from megacell.geneformer.model.config import ModelConfig
from megacell.geneformer.vocabulary.vocabulary import Vocabulary
from megacell.training.interchange import nemo

pytest.importorskip("transformers")
LENGTHS = (31, 7, 40, 2)


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory):
    """Of as many tokens as the network has."""
    genes, specials = VOCABULARY - 4, {"pad": 0, "mask": 1, "cls": 2, "eos": 3}
    path = tmp_path_factory.mktemp("dictionary") / "vocabulary"
    Vocabulary(
        name="made-up", gene_ids=np.array([f"ENSG{g:011d}" for g in range(genes)], object),
        symbols=np.array([""] * genes, object), tokens=np.arange(4, VOCABULARY, dtype=np.int32), medians=np.ones(genes),
        specials=specials, prefix=(2,), suffix=(3,), max_length=64,
    ).save(path)  # fmt: skip
    return path


@pytest.mark.parametrize("kind", ["a directory", "a .nemo file"])
@pytest.mark.parametrize(("norm", "activation"), [("post", "relu"), ("pre", "gelu")], ids=["post-LN", "pre-LN"])
def test_logits_states_and_attention_over_two_ranks_are_those_of_transformers(
    norm, activation, kind, two_ranks, vocabulary, tmp_path
):
    reference = theirs(ModelConfig(**BOTH, norm=norm, activation=activation, tied_head=True, hidden_dropout=0.02))
    reference.save_pretrained(path := tmp_path / "published")
    if kind == "a .nemo file":
        nemo.save(open_model(path, Vocabulary.open(vocabulary)), path := tmp_path / "model.nemo")
    one, other = two_ranks.run(computed, str(path), str(vocabulary), LENGTHS, 2)
    _, padded, real = cells_of(LENGTHS)
    reference.set_attn_implementation("eager")
    with torch.no_grad():
        expected = reference(padded, attention_mask=real.long(), output_hidden_states=True, output_attentions=True)

    def close(found, wanted):
        np.testing.assert_allclose(found, wanted.numpy(), rtol=1e-5, atol=1e-5)

    close(np.concatenate([one["logits"], other["logits"]], 1)[:, :VOCABULARY], expected.logits[real])
    for layer in range(BOTH["layers"]):
        close(one[f"states {layer}"], expected.hidden_states[layer][real])
        for cell, length in enumerate(LENGTHS):
            name = f"attention {layer} {cell}"
            close(np.concatenate([one[name], other[name]]), expected.attentions[layer][cell, :, :length, :length])


@pytest.mark.parametrize(("norm", "activation"), [("post", "relu"), ("pre", "gelu")], ids=["post-LN", "pre-LN"])
def test_a_nemo_file_is_restored_over_two_ranks_as_in_one_process(norm, activation, two_ranks, vocabulary, tmp_path):
    reference = theirs(ModelConfig(**BOTH, norm=norm, activation=activation, tied_head=True, hidden_dropout=0.02))
    reference.save_pretrained(path := tmp_path / "published")
    whole = open_model(path, Vocabulary.open(vocabulary))
    nemo.save(whole, path := tmp_path / "model.nemo")
    made = cells_of(LENGTHS)[0]
    pack = {name: getattr(made, name).numpy() for name in ("tokens", "positions", "cu_seqlens", "masked", "labels")}
    (one, refused), (other, _) = two_ranks.run(restored, str(path), pack, 2)
    assert "each rank has a part" in refused
    np.testing.assert_allclose(np.concatenate([one, other], 1), logits(whole, pack), rtol=1e-5, atol=1e-5)
