# SPDX-License-Identifier: Apache-2.0
"""The network against Hugging Face's BERTs with the same weights: logits, gradients, and where dropout stands.

`BertForMaskedLM` is post-LN, what Geneformer was published as; `MegatronBertForMaskedLM` is pre-LN. Both see padded
cells and put their head on every token, so that packing and the masked-only head are compared as well.
"""

import pytest
import torch
from hugging import BOTH, VOCABULARY, cells_of, theirs

from megacell.geneformer.interchange.hugging_face import to_ours
from megacell.geneformer.model.bert import PackedBert
from megacell.geneformer.model.config import ModelConfig
from megacell.geneformer.model.states import hidden_states
from megacell.training.distributed import device
from megacell.training.nn.layout import Layout
from megacell.training.nn.weights import copy_whole

transformers = pytest.importorskip("transformers")

LENGTHS = (31, 7, 40, 2)
NETWORKS = {
    "post-LN, ReLU, as Geneformer": ("post", "relu", True),
    "post-LN, GELU": ("post", "gelu", True),
    "post-LN, ReLU, a decoder of its own": ("post", "relu", False),
    "pre-LN, GELU, as Megatron": ("pre", "gelu", True),
    "pre-LN, ReLU, a decoder of its own": ("pre", "relu", False),
}


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
        copy_whole(bert, to_ours(reference.state_dict(), network))
    return network, bert.eval(), reference


@pytest.fixture(scope="module")
def cells():
    """The same cells as a pack and padded, with a sixth of their tokens masked."""
    return cells_of(LENGTHS)


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
    expected = dict(to_ours(state, network))
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
