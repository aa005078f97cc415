# SPDX-License-Identifier: Apache-2.0
"""The network against Hugging Face's BERTs with the same weights: logits, gradients, and where dropout stands.

`BertForMaskedLM` is post-LN, what Geneformer was published as; `MegatronBertForMaskedLM` is pre-LN. Both see padded
cells and put their head on every token, so that packing and the masked-only head are compared as well.
"""

import numpy as np
import pytest
import torch

from megacell.geneformer.embed import hidden_states
from megacell.geneformer.model.bert import Pack, PackedBert
from megacell.geneformer.model.config import Layout, ModelConfig
from megacell.geneformer.model.init import PADDING_BIAS, copy_whole
from megacell.geneformer.training import device

transformers = pytest.importorskip("transformers")

LENGTHS = (31, 7, 40, 2)
VOCABULARY = 103
BOTH = {"layers": 3, "hidden": 32, "ffn": 64, "heads": 4, "max_length": 64, "vocabulary_size": VOCABULARY,
        "attention_dropout": 0.0, "layernorm_epsilon": 1e-12, "init_std": 0.02, "scaled_init": False}  # fmt: skip
NETWORKS = {
    "post-LN, ReLU, as Geneformer": ("post", "relu", True),
    "post-LN, GELU": ("post", "gelu", True),
    "post-LN, ReLU, a decoder of its own": ("post", "relu", False),
    "pre-LN, GELU, as Megatron": ("pre", "gelu", True),
    "pre-LN, ReLU, a decoder of its own": ("pre", "relu", False),
}


def theirs(network: ModelConfig):
    """Hugging Face's network of the same kind; every weight, bias and norm random."""
    kind = "Bert" if network.norm == "post" else "MegatronBert"
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=VOCABULARY, hidden_size=network.hidden, num_hidden_layers=network.layers,
        num_attention_heads=network.heads, intermediate_size=network.ffn, hidden_act=network.activation,
        max_position_embeddings=network.max_length, hidden_dropout_prob=network.hidden_dropout,
        attention_probs_dropout_prob=0.0, layer_norm_eps=network.layernorm_epsilon,
        tie_word_embeddings=network.tied_head,
    )  # fmt: skip
    model = getattr(transformers, f"{kind}ForMaskedLM")(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            centre = 1.0 if "LayerNorm.weight" in name or "ln.weight" in name else 0.0
            parameter.normal_(centre, 0.2, generator=generator)
    return model.eval()


def whole(state: dict[str, torch.Tensor], network: ModelConfig) -> dict[str, torch.Tensor]:
    """Hugging Face's weights (or gradients) under our names and in our shapes, token types folded into positions."""
    heads, size = network.heads, network.hidden // network.heads
    padding = network.padded_vocabulary - VOCABULARY
    used = "cls.predictions.bias" if network.tied_head else "cls.predictions.decoder.bias"
    bias = torch.nn.functional.pad(state[used], (0, padding), value=PADDING_BIAS)
    rows = lambda name: torch.nn.functional.pad(state[name], (0, 0, 0, padding))  # noqa: E731
    types = state["bert.embeddings.token_type_embeddings.weight"][0]
    out = {
        "embedding.word_embeddings.weight": rows("bert.embeddings.word_embeddings.weight"),
        "embedding.position_embeddings.weight": state["bert.embeddings.position_embeddings.weight"] + types,
        "output_layer.bias": bias,
    }
    if not network.tied_head:
        out["output_layer.weight"] = rows("cls.predictions.decoder.weight")
    # each norm's name, by where it stands: one for each layer's two inputs, and the last
    layer = "bert.encoder.layer.{}."
    if network.norm == "post":
        first = ["bert.embeddings.LayerNorm"] + [f"{layer}output.LayerNorm".format(i) for i in range(network.layers)]
        second = [f"{layer}attention.output.LayerNorm".format(i) for i in range(network.layers)]
    else:
        first = [f"{layer}attention.ln".format(i) for i in range(network.layers)] + ["bert.encoder.ln"]
        second = [f"{layer}ln".format(i) for i in range(network.layers)]
    for kind in ("weight", "bias"):
        for part, name in (("dense", "dense"), ("LayerNorm", "layer_norm")):
            out[f"lm_head.{name}.{kind}"] = state[f"cls.predictions.transform.{part}.{kind}"]
        out[f"encoder.final_layernorm.{kind}"] = state[f"{first[-1]}.{kind}"]
        for i in range(network.layers):
            there, here = layer.format(i), f"encoder.layers.{i}."
            parts = [state[f"{there}attention.self.{which}.{kind}"] for which in ("query", "key", "value")]
            by_head = torch.cat(parts).view(3, heads, size, -1).transpose(0, 1)
            out |= {
                f"{here}input_layernorm.{kind}": state[f"{first[i]}.{kind}"],
                f"{here}pre_mlp_layernorm.{kind}": state[f"{second[i]}.{kind}"],
                f"{here}self_attention.linear_qkv.{kind}": by_head.reshape(3 * network.hidden, *parts[0].shape[1:]),
                f"{here}self_attention.linear_proj.{kind}": state[f"{there}attention.output.dense.{kind}"],
                f"{here}mlp.linear_fc1.{kind}": state[f"{there}intermediate.dense.{kind}"],
                f"{here}mlp.linear_fc2.{kind}": state[f"{there}output.dense.{kind}"],
            }
    return out


@pytest.fixture(params=NETWORKS.values(), ids=NETWORKS.keys())
def pair(request):
    """The two networks, with the same weights."""
    norm, activation, tied = request.param
    return made(norm, activation, tied)


def made(norm: str, activation: str, tied: bool, hidden_dropout: float = 0.0):
    network = ModelConfig(**BOTH, norm=norm, activation=activation, tied_head=tied, hidden_dropout=hidden_dropout)
    reference = theirs(network)
    with device.single_process():
        bert = PackedBert(network, Layout())
        copy_whole(bert, whole(reference.state_dict(), network))
    return network, bert.eval(), reference


@pytest.fixture(scope="module")
def cells():
    """The same cells as a pack and padded, with a sixth of their tokens masked."""
    return cells_of(LENGTHS)


def cells_of(lengths):
    draw = np.random.default_rng(0)
    starts = np.concatenate([[0], np.cumsum(lengths)])
    tokens, positions = draw.integers(1, VOCABULARY, starts[-1]), np.concatenate([np.arange(n) for n in lengths])
    masked = np.sort(draw.choice(starts[-1], starts[-1] // 6, replace=False))
    arrays = (tokens, positions, starts.astype(np.int32))
    pack = Pack(*map(torch.from_numpy, arrays), max(lengths), torch.from_numpy(masked),
                torch.from_numpy(draw.integers(1, VOCABULARY, len(masked))))  # fmt: skip
    real = torch.arange(max(lengths))[None] < torch.tensor(lengths)[:, None]
    padded = torch.zeros(real.shape, dtype=torch.int64)
    padded[real] = pack.tokens
    return pack, padded, real


def test_logits_equal_hugging_faces(pair, cells):
    _, bert, reference = pair
    pack, padded, real = cells
    with device.single_process(), torch.no_grad():
        ours = bert.logits(bert.encode(pack))
    with torch.no_grad():
        expected = reference(padded, attention_mask=real.long()).logits[real]
    assert float(expected.std()) > 0.5
    torch.testing.assert_close(ours[:, :VOCABULARY], expected, rtol=1e-5, atol=1e-5)


def test_the_states_after_each_layer_equal_hugging_faces(pair, cells):
    network, bert, reference = pair
    pack, padded, real = cells
    with torch.no_grad():
        expected = reference(padded, attention_mask=real.long(), output_hidden_states=True).hidden_states
    for layer in range(1, network.layers + 1):
        with device.single_process(), torch.no_grad():
            states = hidden_states(bert, pack, layer)
        torch.testing.assert_close(states, expected[layer][real], rtol=1e-5, atol=1e-5)


def test_every_gradient_equals_hugging_faces(pair, cells):
    network, bert, reference = pair
    pack, padded, real = cells
    with device.single_process():
        bert(pack).sum().backward()
    labels = torch.full_like(pack.tokens, -100)
    labels[pack.masked] = pack.labels
    logits = reference(padded, attention_mask=real.long()).logits[real]
    torch.nn.functional.cross_entropy(logits, labels, ignore_index=-100, reduction="sum").backward()
    state = {name: p.grad if p.grad is not None else torch.zeros_like(p) for name, p in reference.named_parameters()}
    state["bert.embeddings.token_type_embeddings.weight"] = torch.zeros(2, network.hidden)  # that of the positions
    expected = whole(state, network)
    expected["output_layer.bias"][VOCABULARY:] = 0.0
    for name, parameter in bert.named_parameters():
        scale = float(expected[name].abs().max())
        assert scale > 0, name
        torch.testing.assert_close(
            parameter.grad, expected[name], rtol=0, atol=1e-5 * scale, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("norm", ["post", "pre"])
def test_dropout_stands_where_hugging_face_has_it(norm):
    """One cell without padding draws the same random numbers in both: what is dropped must be the same."""
    _, bert, reference = made(norm, "relu", True, hidden_dropout=0.3)
    pack, padded, real = cells_of((40,))
    with device.single_process(), torch.no_grad():
        torch.manual_seed(3)
        ours = bert.train().logits(bert.encode(pack))
        still = bert.eval().logits(bert.encode(pack))
    with torch.no_grad():
        torch.manual_seed(3)
        expected = reference.train()(padded, attention_mask=real.long()).logits[real]
    assert not torch.allclose(ours, still, atol=0.1)
    torch.testing.assert_close(ours[:, :VOCABULARY], expected, rtol=1e-5, atol=1e-5)
