# SPDX-License-Identifier: Apache-2.0
"""Megatron BERTs of NeMo 1 and BioNeMo 1 compute here what they computed there; what is no Geneformer is refused."""

import io
import json
import tarfile
from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hugging import cells_of

from megacell.core.errors import DataError, MegacellError, UsageError
from megacell.geneformer.interchange import hugging_face
from megacell.geneformer.interchange.open import open_model
from megacell.geneformer.model.states import hidden_states
from megacell.geneformer.vocabulary.bionemo_dictionaries import import_bionemo, is_bionemo, read_tokens
from megacell.training.distributed import device
from megacell.training.interchange import nemo

GENES, HIDDEN, FFN, HEADS, LAYERS, LENGTH, PADDED = 98, 32, 64, 4, 3, 64, 128
SPECIALS = ["[CLS]", "[MASK]", "[PAD]", "[SEP]", "[UKW]"]
CONFIG = {
    "num_layers": LAYERS, "hidden_size": HIDDEN, "ffn_hidden_size": FFN, "num_attention_heads": HEADS,
    "max_position_embeddings": LENGTH, "seq_length": LENGTH, "hidden_dropout": 0.02, "attention_dropout": 0.1,
    "layernorm_epsilon": 1e-12, "init_method_std": 0.02, "make_vocab_size_divisible_by": 128, "kv_channels": None,
    "tensor_model_parallel_size": 1, "pipeline_model_parallel_size": 1, "bert_binary_head": False,
    "target": "bionemo.model.singlecell.geneformer.GeneformerModel", "activation": "gelu",
    "tokenizer": {"vocab_file": "nemo:0f_geneformer.vocab"}, "data": {"medians_file": "nemo:0f_medians.json"},
}  # fmt: skip
EMBEDDING, ENCODER = "model.language_model.embedding.", "model.language_model.encoder."
CUT = {0: ("word_embeddings.weight", "query_key_value.weight", "query_key_value.bias", "dense_h_to_4h.weight",
           "dense_h_to_4h.bias", "lm_head.bias"),
       1: ("self_attention.dense.weight", "dense_4h_to_h.weight")}  # fmt: skip


def made_weights():
    """Random weights under NeMo 1's names."""
    draw = torch.Generator().manual_seed(0)
    shapes = {f"{EMBEDDING}word_embeddings": (PADDED, HIDDEN), f"{EMBEDDING}position_embeddings": (LENGTH, HIDDEN),
              "model.lm_head.dense": (HIDDEN, HIDDEN)}  # fmt: skip
    norms = [f"{ENCODER}final_layernorm", "model.lm_head.layernorm"]
    for i in range(LAYERS):
        layer = f"{ENCODER}layers.{i}."
        norms += [f"{layer}input_layernorm", f"{layer}post_attention_layernorm"]
        shapes |= {f"{layer}self_attention.query_key_value": (3 * HIDDEN, HIDDEN),
                   f"{layer}self_attention.dense": (HIDDEN, HIDDEN),
                   f"{layer}mlp.dense_h_to_4h": (FFN, HIDDEN), f"{layer}mlp.dense_4h_to_h": (HIDDEN, FFN)}  # fmt: skip
    state = {f"{name}.weight": 0.2 * torch.randn(shape, generator=draw) for name, shape in shapes.items()}
    for name, shape in shapes.items():
        if "embeddings" not in name:
            state[f"{name}.bias"] = 0.2 * torch.randn(shape[0], generator=draw)
    for name in norms:
        state[f"{name}.weight"] = 1 + 0.2 * torch.randn(HIDDEN, generator=draw)
        state[f"{name}.bias"] = 0.2 * torch.randn(HIDDEN, generator=draw)
    return state | {"model.lm_head.bias": 0.2 * torch.randn(PADDED, generator=draw)}


def original(state, tokens, fused=True):
    """The network as NeMo 1 computes it for one cell: logits, and the states after each layer but the last."""

    def linear(name, x):
        return F.linear(x, state[f"{name}.weight"], state[f"{name}.bias"])

    def norm(name, x):
        return F.layer_norm(x, (HIDDEN,), state[f"{name}.weight"], state[f"{name}.bias"], 1e-12)

    def gelu(x):
        return x * 0.5 * (1 + torch.tanh(0.79788456 * x * (1 + 0.044715 * x * x))) if fused else F.gelu(x)

    words, n, size = state[f"{EMBEDDING}word_embeddings.weight"], len(tokens), HIDDEN // HEADS
    x, states = words[tokens] + state[f"{EMBEDDING}position_embeddings.weight"][:n], []
    for i in range(LAYERS):
        layer = f"{ENCODER}layers.{i}."
        mixed = linear(f"{layer}self_attention.query_key_value", norm(f"{layer}input_layernorm", x))
        query, key, value = mixed.view(n, HEADS, 3 * size).split(size, 2)
        weights = torch.einsum("ihd,jhd->hij", query, key).div(size**0.5).softmax(-1)
        x = x + linear(f"{layer}self_attention.dense", torch.einsum("hij,jhd->ihd", weights, value).reshape(n, HIDDEN))
        inner = gelu(linear(f"{layer}mlp.dense_h_to_4h", norm(f"{layer}post_attention_layernorm", x)))
        x = x + linear(f"{layer}mlp.dense_4h_to_h", inner)
        states.append(x)
    head = norm("model.lm_head.layernorm", F.gelu(linear("model.lm_head.dense", norm(f"{ENCODER}final_layernorm", x))))
    return head @ words.T + state["model.lm_head.bias"], states[:-1]


def shared_out(state, ranks):
    """What each tensor parallel rank saves."""
    ends = {end: dimension for dimension, names in CUT.items() for end in names}
    parts = [{} for _ in range(ranks)]
    for name, tensor in state.items():
        dimension = next((d for end, d in ends.items() if name.endswith(end)), None)
        cut = [tensor] * ranks if dimension is None else tensor.chunk(ranks, dimension)
        for part, own in zip(parts, cut, strict=True):
            part[name] = own.clone()
    return parts


def dictionaries():
    genes = [f"ENSG{g:011d}" for g in range(GENES)]
    medians = {gene: 0.5 + 0.01 * i for i, gene in enumerate(genes[1:])}  # BioNeMo divides by 1 where there is none
    return "\n".join([*SPECIALS, *genes]) + "\n", json.dumps(medians)


def write(path, state, config=(), ranks=1, folder="mp_rank_{:02}", packed="w:", with_dictionaries=True, leave_out=()):
    """Write a .nemo file as NeMo 1 lays it out."""
    from omegaconf import OmegaConf

    cut = {"tensor_model_parallel_size": ranks, "make_vocab_size_divisible_by": PADDED // ranks}
    files = {"model_config.yaml": OmegaConf.to_yaml({**CONFIG, **cut, **dict(config)})}
    if with_dictionaries:
        files["0f_geneformer.vocab"], files["0f_medians.json"] = dictionaries()
    for rank, part in enumerate(shared_out(state, ranks)):
        if rank not in leave_out:
            torch.save(part, buffer := io.BytesIO())
            files[(f"{folder.format(rank)}/" if ranks > 1 else "") + "model_weights.ckpt"] = buffer.getvalue()
    with tarfile.open(path, packed) as tar:
        for name, content in files.items():
            content = content.encode() if isinstance(content, str) else content
            member = tarfile.TarInfo(f"./{name}")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


@pytest.fixture(scope="module")
def state():
    return made_weights()


@pytest.fixture(scope="module")
def cells():
    return cells_of((31, 7, 40, 2))[0]


def check(model, state, cells, fused=True):
    """Logits and hidden states equal those of the original network."""
    bounds = cells.cu_seqlens.tolist()
    rows = model.vocabulary.size
    with device.single_process(), torch.inference_mode():
        ours = model.bert.logits(model.bert.encode(cells))
        layers = [hidden_states(model.bert, cells, layer) for layer in range(1, LAYERS)]
    for a, b in pairwise(bounds):
        logits, states = original(state, cells.tokens[a:b], fused)
        torch.testing.assert_close(ours[a:b, :rows], logits[:, :rows], rtol=1e-5, atol=1e-5)
        for layer, expected in zip(layers, states, strict=True):
            torch.testing.assert_close(layer[a:b], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("packed", ["w:", "w:gz"], ids=["a tar", "a compressed tar"])
def test_it_computes_what_the_original_network_does(packed, state, cells, tmp_path):
    model = open_model(write(tmp_path / "one.nemo", state, packed=packed))
    assert model.sizes.activation == "gelu_tanh"  # its fused kernel's
    check(model, state, cells)
    nemo.save(model, tmp_path / "ours.nemo")
    check(open_model(tmp_path / "ours.nemo"), state, cells)


def test_without_the_fused_kernel_its_gelu_is_exact_and_it_goes_out_to_transformers(state, cells, tmp_path):
    model = open_model(write(tmp_path / "one.nemo", state, {"bias_gelu_fusion": False}))
    check(model, state, cells, fused=False)
    fused, exact = (original(state, cells.tokens[:31], kind)[0] for kind in (True, False))
    assert (fused - exact).abs().max() > 1e-4  # the two can be told apart
    hugging_face.save(model, tmp_path / "out")
    check(open_model(tmp_path / "out"), state, cells, fused=False)


def test_with_the_fused_kernel_it_does_not_go_out_to_transformers(state, tmp_path):
    model = open_model(write(tmp_path / "one.nemo", state))
    with pytest.raises(DataError, match="GELU by tanh"):
        hugging_face.save(model, tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["one.nemo"]


@pytest.mark.parametrize("folder", ["mp_rank_{:02}", "tp_rank_{:02}_pp_rank_000"])
def test_what_tensor_parallel_ranks_saved_is_joined(folder, state, cells, tmp_path):
    check(open_model(write(tmp_path / "two.nemo", state, {}, 2, folder)), state, cells)


def test_later_names_on_megatron_core_are_known_too(state, cells, tmp_path):
    renamed = {}
    for name, tensor in state.items():
        renamed_name = name
        for theirs, later in (
            ("language_model.", "module."), ("query_key_value", "linear_qkv"), ("dense_h_to_4h", "linear_fc1"),
            ("self_attention.dense", "self_attention.linear_proj"), ("dense_4h_to_h", "linear_fc2"),
            (".input_layernorm.", ".self_attention.linear_qkv.layer_norm_"),
            ("lm_head.layernorm", "lm_head.layer_norm"),
            (".post_attention_layernorm.", ".mlp.linear_fc1.layer_norm_"), ("lm_head.bias", "output_layer.bias"),
        ):  # fmt: skip
            renamed_name = renamed_name.replace(theirs, later)
        renamed[renamed_name] = tensor
    check(open_model(write(tmp_path / "core.nemo", renamed, {"mcore_bert": True})), state, cells)


def test_its_dictionaries_are_its_vocabulary(state, tmp_path):
    vocabulary = open_model(write(tmp_path / "one.nemo", state)).vocabulary
    assert vocabulary.specials == {"cls": 0, "mask": 1, "pad": 2}
    assert vocabulary.prefix == (0,)
    assert vocabulary.suffix == ()
    assert vocabulary.tokens_of(["ENSG00000000003"]) == [8]
    assert vocabulary.medians[:3].tolist() == [1.0, 0.5, 0.51]


def test_bionemos_dictionaries_are_known_by_their_content(tmp_path):
    lines, medians = dictionaries()
    (tmp_path / "a").write_text(lines)
    (tmp_path / "b").write_text(json.dumps({"vocab": {name: i for i, name in enumerate(lines.split())}}))
    (tmp_path / "medians").write_text(medians)
    assert is_bionemo(tmp_path / "a")
    one, other = (import_bionemo(tmp_path / name, tmp_path / "medians") for name in "ab")
    assert np.array_equal(one.gene_ids, other.gene_ids)
    assert np.array_equal(one.tokens, other.tokens)
    for content in (b"a\nb\n", b"[CLS]\n[PAD]\n", b'{"vocab": 3}', b"[CLS]\n" * 9, b"\xff\xfe"):
        with pytest.raises(DataError, match="some: not BioNeMo's list of tokens"):
            read_tokens(content, "some")
    (tmp_path / "medians").write_text('{"ENSG00000000001": 1.0}')
    with pytest.raises(DataError, match="no pair"):
        import_bionemo(tmp_path / "a", tmp_path / "medians")


def test_the_published_genes_are_named_for_what_they_are(published, tmp_path):
    genes = sorted(published["V1"].gene_ids)
    (tmp_path / "geneformer.vocab").write_text("\n".join([*SPECIALS, *genes]))
    (tmp_path / "medians.json").write_text(json.dumps(dict.fromkeys(genes, 1.0)))
    made = import_bionemo(tmp_path / "geneformer.vocab", tmp_path / "medians.json")
    assert (made.name, made.size) == ("bionemo-geneformer", 25_429)


BAD = {
    "post-LN": ({"transformer_block_type": "post_ln"}, {}, "transformer_block_type is 'post_ln'"),
    "another norm": ({"normalization": "rmsnorm"}, {}, "normalization is 'rmsnorm'"),
    "another activation": ({"activation": "swiglu"}, {}, "activation is 'swiglu'"),
    "rotary positions": ({"position_embedding_type": "rope"}, {}, "position_embedding_type is 'rope'"),
    "the oldest layout of attention": ({"megatron_legacy": True}, {}, "megatron_legacy"),
    "pipeline ranks": ({"pipeline_model_parallel_size": 2}, {}, "pipeline_model_parallel_size is 2"),
    "odd heads": ({"num_attention_heads": 5}, {}, "does not divide"),
    "no heads": ({"num_attention_heads": None}, {}, "heads=None"),
    "fewer layers than it holds": ({"num_layers": 2}, {}, "unknown"),
    "more layers than it holds": ({"num_layers": 4}, {}, "missing"),
    "another width": ({"ffn_hidden_size": 48}, {}, "they are no pair"),
    "a rank too few": ({}, {"ranks": 2, "leave_out": (1,)}, "2 tensor parallel rank"),
    "ranks of a pipeline": ({}, {"ranks": 2, "folder": "tp_rank_00_pp_rank_{:03}"}, "2 tensor parallel rank"),
}  # fmt: skip


@pytest.mark.parametrize(("config", "options", "words"), BAD.values(), ids=BAD.keys())
def test_what_is_no_geneformer_is_refused_with_its_reason(config, options, words, state, tmp_path):
    path = write(tmp_path / "bad.nemo", state, config, **options)
    with pytest.raises(MegacellError, match=words) as refused:
        open_model(path)
    assert str(refused.value).startswith(str(path))
    assert "\n" not in str(refused.value)
    assert [p.name for p in tmp_path.iterdir()] == ["bad.nemo"]


def test_another_vocabulary_is_refused_and_a_lacking_one_asked_for(state, cells, vocabulary_for, tmp_path):
    other = vocabulary_for(genes=GENES)
    with pytest.raises(DataError, match="gives 98 genes other tokens"):
        open_model(write(tmp_path / "one.nemo", state), other)
    bare = write(tmp_path / "bare.nemo", state, with_dictionaries=False)
    with pytest.raises(UsageError, match="give the --vocabulary"):
        open_model(bare)
    with pytest.raises(DataError, match=r"word_embeddings.weight is \(128, 32\), .* \(256, 32\)"):
        open_model(bare, vocabulary_for(genes=200))
    (tmp_path / "a").write_text(dictionaries()[0])
    (tmp_path / "m").write_text(dictionaries()[1])
    check(open_model(bare, import_bionemo(tmp_path / "a", tmp_path / "m")), state, cells)
