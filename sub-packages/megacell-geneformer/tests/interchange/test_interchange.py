# SPDX-License-Identifier: Apache-2.0
"""Models of Hugging Face come in and go out without loss; what is damaged, foreign or malicious is refused."""

import json
import os
import pickle
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from hugging import BOTH, VOCABULARY, cells_of, theirs
from safetensors.torch import load_file, save_file

from megacell.core.errors import DataError, MegacellError, UsageError
from megacell.geneformer.interchange import hugging_face
from megacell.geneformer.interchange.open import check_fit, load_into, open_model
from megacell.geneformer.model.config import ModelConfig
from megacell.geneformer.model.states import attention_maps, hidden_states
from megacell.geneformer.vocabulary.geneformer_dictionaries import import_geneformer
from megacell.training.distributed import device
from megacell.training.interchange import nemo
from megacell.training.nn.weights import copy_whole

transformers = pytest.importorskip("transformers")
KINDS = {
    "post-LN ReLU": ("post", "relu", True),
    "post-LN GELU untied": ("post", "gelu", False),
    "pre-LN": ("pre", "gelu", True),
}


@pytest.fixture(scope="module")
def vocabulary(vocabulary_for):
    return vocabulary_for(genes=VOCABULARY - 4)


@pytest.fixture(params=KINDS.values(), ids=KINDS.keys())
def published(request, tmp_path):
    """A directory as save_pretrained writes it, and its model."""
    norm, activation, tied = request.param
    return published_as(tmp_path, norm, activation, tied)


def published_as(tmp_path, norm="post", activation="relu", tied=True):
    sizes = ModelConfig(**BOTH, norm=norm, activation=activation, tied_head=tied, hidden_dropout=0.02)
    model = theirs(sizes)
    if not tied:
        with torch.no_grad():  # one bias under two names, as transformers 4 has it
            model.cls.predictions.bias.copy_(model.cls.predictions.decoder.bias)
    model.save_pretrained(tmp_path / "published")
    return tmp_path / "published", model


@pytest.fixture
def directory(tmp_path):
    """A post-LN directory, for what is to be refused."""
    return published_as(tmp_path)[0]


def predictions(model, pack):
    with device.single_process(), torch.inference_mode():
        return model.bert.logits(model.bert.encode(pack))[:, :VOCABULARY]


def test_a_published_model_gives_the_same_hidden_states_and_logits(published, vocabulary):
    path, reference = published
    model = open_model(path, vocabulary)
    pack, padded, real = cells_of((31, 7, 40, 2))
    with torch.no_grad():
        expected = reference(padded, attention_mask=real.long(), output_hidden_states=True)
    torch.testing.assert_close(predictions(model, pack), expected.logits[real], rtol=1e-5, atol=1e-5)
    with device.single_process(), torch.inference_mode():
        for layer, states in enumerate(expected.hidden_states):
            if layer == model.sizes.layers and model.sizes.norm == "pre":
                continue  # theirs is that before the last norm
            torch.testing.assert_close(hidden_states(model.bert, pack, layer), states[real], rtol=1e-5, atol=1e-5)


def test_it_attends_as_the_published_one_does(published, vocabulary):
    path, reference = published
    model = open_model(path, vocabulary)
    lengths = (31, 7, 40, 2)
    pack, padded, real = cells_of(lengths)
    reference.set_attn_implementation("eager")
    with torch.no_grad():
        expected = reference(padded, attention_mask=real.long(), output_attentions=True).attentions
    for layer in range(model.sizes.layers):
        with device.single_process(), torch.inference_mode():
            maps = attention_maps(model.bert, pack, layer + 1)
        for cell, length in enumerate(lengths):
            theirs_here = expected[layer][cell, :, :length, :length]
            torch.testing.assert_close(maps[cell], theirs_here, rtol=1e-5, atol=1e-5)


def test_it_goes_out_again_and_transformers_finds_every_tensor(published, vocabulary, tmp_path):
    path, reference = published
    model = open_model(path, vocabulary)
    hugging_face.save(model, tmp_path / "out")
    again, report = type(reference).from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    _, padded, real = cells_of((31, 7, 40, 2))
    with torch.no_grad():
        one, other = (m.eval()(padded, attention_mask=real.long()).logits[real] for m in (reference, again))
    torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)  # folding rounds
    given, written = load_file(path / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    for name in set(given) & set(written) - {hugging_face.POSITIONS, hugging_face.TYPES}:
        assert torch.equal(given[name], written[name]), name
    folded = given[hugging_face.POSITIONS] + given[hugging_face.TYPES][0]
    assert torch.equal(written[hugging_face.POSITIONS], folded)


def test_a_round_trip_of_ours_is_equal_bit_for_bit(published, vocabulary, tmp_path):
    model = open_model(published[0], vocabulary)
    hugging_face.save(model, tmp_path / "out")
    again = open_model(tmp_path / "out")  # finds the vocabulary that was written with it
    assert again.vocabulary.hash == vocabulary.hash
    for name, tensor in model.weights().items():
        assert torch.equal(tensor, again.weights()[name]), name
    nemo.save(again, tmp_path / "model.nemo")
    third = open_model(tmp_path / "model.nemo")
    assert all(torch.equal(tensor, third.weights()[name]) for name, tensor in model.weights().items())


def test_the_dictionaries_that_go_out_come_in_as_geneformers(directory, vocabulary, tmp_path):
    out = tmp_path / "out"
    hugging_face.save(open_model(directory, vocabulary), out)
    paths = [out / f"{name}.pkl" for name in ("token_dictionary", "gene_median_dictionary", "ensembl_mapping_dict")]
    read = import_geneformer(*paths, out / "gene_name_id_dict.pkl")
    assert dict(zip(read.gene_ids, read.tokens, strict=True)) == dict(
        zip(vocabulary.gene_ids, vocabulary.tokens, strict=True)
    )
    assert read.specials == vocabulary.specials
    np.testing.assert_array_equal(np.sort(read.medians), np.sort(vocabulary.medians))
    card = (out / "README.md").read_text()
    assert vocabulary.hash in card
    assert "BertForMaskedLM" in card


def test_weights_in_shards_and_in_torchs_own_file_are_read(directory, vocabulary, tmp_path):
    whole = open_model(directory, vocabulary)
    sharded, pickled = tmp_path / "sharded", tmp_path / "pickled"
    for folder in (sharded, pickled):
        shutil.copytree(directory, folder)
        (folder / "model.safetensors").unlink()
    state = load_file(directory / "model.safetensors")
    torch.save({**state, "bert.embeddings.position_ids": torch.arange(64)[None]}, pickled / "pytorch_model.bin")
    halves = {name: f"model-{i % 2}.safetensors" for i, name in enumerate(state)}
    for file in set(halves.values()):
        save_file({name: state[name] for name in state if halves[name] == file}, sharded / file)
    (sharded / "model.safetensors.index.json").write_text(json.dumps({"weight_map": halves}))
    for folder in (sharded, pickled):
        model = open_model(folder, vocabulary)
        assert all(torch.equal(tensor, model.weights()[name]) for name, tensor in whole.weights().items())


def test_training_may_start_from_it(directory, vocabulary):
    model = open_model(directory, vocabulary)
    check_fit(replace(model.sizes, hidden_dropout=0.3), vocabulary, directory)
    with pytest.raises(DataError, match="its layers differ"):
        check_fit(replace(model.sizes, layers=2), vocabulary, directory)
    before = {name: tensor.clone() for name, tensor in model.weights().items()}
    with device.single_process(), torch.no_grad():
        for parameter in model.bert.parameters():
            parameter.zero_()
        load_into(model.bert, model.sizes, vocabulary, directory)
    assert all(torch.equal(tensor, model.weights()[name]) for name, tensor in before.items())


def test_weights_of_half_precision_are_widened_before_anything_is_computed(directory, vocabulary, tmp_path):
    half, wide = tmp_path / "half", tmp_path / "wide"
    state = {name: tensor.bfloat16() for name, tensor in load_file(directory / "model.safetensors").items()}
    for folder, tensors in ((half, state), (wide, {name: tensor.float() for name, tensor in state.items()})):
        shutil.copytree(directory, folder)
        save_file(tensors, folder / "model.safetensors")
    one, other = (open_model(folder, vocabulary).weights() for folder in (half, wide))
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())
    assert {tensor.dtype for tensor in one.values()} == {torch.float32}


def test_a_standing_network_is_unchanged_by_weights_that_are_refused(directory, vocabulary):
    model = open_model(directory, vocabulary)
    before = {name: tensor.clone() for name, tensor in model.weights().items()}

    def spoil(state):
        state[max(state)][..., -1] = float("nan")

    change_tensors(lambda state: [tensor.mul_(2) for tensor in state.values()])(directory)
    change_tensors(spoil)(directory)
    with pytest.raises(DataError, match="NaN"), device.single_process():
        load_into(model.bert, model.sizes, vocabulary, directory)
    assert all(torch.equal(tensor, model.weights()[name]) for name, tensor in before.items())


@pytest.mark.parametrize(("name", "given"), [("lm_head.dense.bias", []), ("unknown", ["unknown"])])
def test_weights_that_are_not_the_networks_do_not_fill_it(name, given, directory, vocabulary):
    model = open_model(directory, vocabulary)
    weights = {key.removeprefix("bert."): tensor for key, tensor in model.weights().items()}
    weights.pop(name, None)
    with pytest.raises(KeyError, match=name):
        copy_whole(model.bert, [*weights.items(), *((key, torch.zeros(1)) for key in given)])


# -- what is refused


class Danger:
    def __reduce__(self):
        return os.system, ("touch /tmp/megacell-was-here",)


def change_config(**values):
    def change(folder):
        config = json.loads((folder / "config.json").read_text())
        for name, value in values.items():
            config[name] = value
        (folder / "config.json").write_text(json.dumps(config))

    return change


def change_tensors(change):
    def rewrite(folder):
        state = load_file(folder / "model.safetensors")
        change(state)
        save_file(state, folder / "model.safetensors")

    return rewrite


def as_pickle(content):
    def write(folder):
        (folder / "model.safetensors").unlink()
        with open(folder / "pytorch_model.bin", "wb") as file:
            pickle.dump(content, file)

    return write


def cut(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:5000])


def index_outside(folder):
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "../../etc/passwd"}}))


def bomb(folder):
    file = folder / "model.safetensors"
    file.write_bytes((1 << 62).to_bytes(8, "little") + b"{}")


BAD = {
    "no object in its config": (lambda f: (f / "config.json").write_text("[]"), "holds no object"),
    "a broken config": (lambda f: (f / "config.json").write_text("{"), "cannot be read"),
    "a classifier": (change_config(architectures=["BertForSequenceClassification"]), "architecture"),
    "relative positions": (change_config(position_embedding_type="relative_key"), "position_embedding_type"),
    "another activation": (change_config(hidden_act="gelu_new"), "hidden_act"),
    "a decoder": (change_config(is_decoder=True), "is_decoder"),
    "heads that do not divide": (change_config(num_attention_heads=5), "does not divide"),
    "another vocabulary's size": (change_config(vocab_size=90), "another dictionary"),
    "fewer layers than its config": (change_config(num_hidden_layers=4), "missing"),
    "more layers than its config": (change_config(num_hidden_layers=2), "unknown"),
    "wider than its config": (change_config(intermediate_size=32), "they are no pair"),
    "a tensor too many": (change_tensors(lambda s: s.update(extra=torch.zeros(3))), "unknown"),
    "a tensor too few": (change_tensors(lambda s: s.pop("cls.predictions.bias")), "missing"),
    "NaN": (change_tensors(lambda s: s["cls.predictions.bias"].fill_(float("nan"))), "NaN"),
    "a decoder that is not the embedding": (
        change_tensors(lambda s: s.update({"cls.predictions.decoder.weight": torch.ones(VOCABULARY, 32)})),
        "but the two differ",
    ),
    "a truncated file": (cut, "cannot be read"),
    "a header of 4 EiB": (bomb, "cannot be read"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "has neither"),
    "an index that leads outside": (index_outside, "outside"),
    "a pickle that runs a command": (as_pickle({"a": Danger()}), "refused"),
    "a pickle of something else": (as_pickle([1, 2]), "cannot be read"),
}


@pytest.mark.parametrize(("damage", "words"), BAD.values(), ids=BAD.keys())
def test_what_cannot_be_right_is_refused_with_its_reason(damage, words, directory, vocabulary):
    damage(directory)
    before = sorted(path.name for path in directory.parent.iterdir())
    with pytest.raises(MegacellError, match=words) as refused:
        open_model(directory, vocabulary)
    assert str(directory) in str(refused.value)
    assert "\n" not in str(refused.value)
    assert sorted(path.name for path in directory.parent.iterdir()) == before
    assert not os.path.exists("/tmp/megacell-was-here")


def test_without_a_vocabulary_of_its_size_one_is_asked_for(directory):
    with pytest.raises(UsageError, match="give --vocabulary"):
        open_model(directory)


def test_another_vocabulary_than_the_models_own_is_refused(directory, vocabulary, vocabulary_for, tmp_path):
    hugging_face.save(open_model(directory, vocabulary), tmp_path / "out")
    other = vocabulary_for(genes=VOCABULARY - 4, medians=np.full(VOCABULARY - 4, 3.0))
    with pytest.raises(DataError, match="another vocabulary"):
        check_fit(hugging_face.read_sizes(tmp_path / "out"), other, tmp_path / "out")
    with pytest.raises(DataError, match="another vocabulary"):
        open_model(tmp_path / "out", other)


def test_nothing_is_written_over(directory, vocabulary, tmp_path):
    model = open_model(directory, vocabulary)
    (tmp_path / "there").mkdir()
    with pytest.raises(UsageError, match="exists"):
        hugging_face.save(model, tmp_path / "there")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["published", "there"]
