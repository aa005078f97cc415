# SPDX-License-Identifier: Apache-2.0
"""compile=true: the same losses and gradients, no kernel made anew for a pack of another size, and what it needs."""

from itertools import pairwise

import numpy as np
import pytest
import torch

from megacell.core.errors import UsageError
from megacell.geneformer.model.bert import Pack, PackedBert
from megacell.geneformer.model.config import ModelConfig
from megacell.geneformer.model.initial_weights import initialise
from megacell.training.distributed import device
from megacell.training.nn import fusion
from megacell.training.nn.layout import Layout

SIZES = {"layers": 2, "hidden": 32, "ffn": 64, "heads": 4, "max_length": 64, "vocabulary_size": 104,
         "attention_dropout": 0.0, "layernorm_epsilon": 1e-12, "init_std": 0.02, "scaled_init": True}  # fmt: skip
NETWORKS = {
    "pre-LN, GELU": {"norm": "pre", "activation": "gelu", "tied_head": True},
    "post-LN, ReLU": {"norm": "post", "activation": "relu", "tied_head": False},
}


@pytest.fixture(params=["traced", pytest.param("compiled", marks=pytest.mark.exhaustive)])
def how(request, monkeypatch):
    """As it is compiled, or, which takes no minute, only traced: graphs and their guards are the same."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    fusion._compiled.cache_clear()
    if request.param == "traced":
        compile_ = torch.compile
        monkeypatch.setattr(
            torch, "compile", lambda f, options, **kwargs: compile_(f, backend="aot_eager_decomp_partition", **kwargs)
        )
    yield request.param
    assert not torch._dynamo.utils.counters["graph_break"]
    fusion._compiled.cache_clear()


def network(dropout: float = 0.0, *, compiled: bool, **kind) -> PackedBert:
    sizes = ModelConfig(**SIZES, **kind, hidden_dropout=dropout)
    bert = PackedBert(sizes, Layout(compiled=compiled))
    initialise(bert, sizes, seed=3)
    return bert


def pack(seed: int, cells: int, masked: int) -> Pack:
    draw = np.random.default_rng(seed)
    lengths = draw.integers(1, 64, cells)
    bounds = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    places = np.sort(draw.choice(bounds[-1], masked, replace=False))
    arrays = (
        draw.integers(4, 104, bounds[-1]),
        np.concatenate([np.arange(b - a) for a, b in pairwise(bounds)]),
        bounds,
    )
    return Pack(
        *map(torch.from_numpy, arrays), 64, torch.from_numpy(places), torch.from_numpy(draw.integers(4, 104, masked))
    )


def losses_and_gradients(bert: PackedBert, packs: list[Pack]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    bert.zero_grad()
    losses = [bert(each) for each in packs]
    torch.cat(losses).sum().backward()
    return torch.cat(losses).detach(), {name: parameter.grad for name, parameter in bert.named_parameters()}


@pytest.mark.parametrize("kind", NETWORKS.values(), ids=NETWORKS.keys())
def test_losses_and_gradients_are_those_without_compiling(how, kind):
    packs = [pack(seed, cells, masked) for seed, (cells, masked) in enumerate([(5, 20), (9, 70), (3, 2)])]
    with device.single_process():
        ours, gradients = losses_and_gradients(network(compiled=True, **kind), packs)
        expected, others = losses_and_gradients(network(compiled=False, **kind), packs)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 5
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)
    for name, gradient in others.items():
        torch.testing.assert_close(gradients[name], gradient, rtol=0, atol=1e-4 * float(gradient.abs().max()))


def test_packs_of_other_sizes_need_no_other_graph(how):
    graphs, sizes = [], [(5, 20), (9, 70), (3, 2), (6, 64), (7, 65), (8, 129), (12, 130), (4, 33)]
    with device.single_process():
        bert = network(0.1, compiled=True, **NETWORKS["pre-LN, GELU"])
        for seed, (cells, masked) in enumerate(sizes):
            losses_and_gradients(bert, [pack(seed, cells, masked)])
            with torch.no_grad():
                bert.eval()(pack(seed, cells + 1, masked))
            bert.train()
            graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert graphs == [graphs[0]] * len(sizes)


def test_dropout_draws_the_same_numbers_again(how):
    kind, packs = NETWORKS["pre-LN, GELU"], [pack(1, 6, 30)]
    with device.single_process():
        drawn = []
        for compiled in (True, True, False):
            device.seed_step(0, 5)
            drawn.append(losses_and_gradients(network(0.3, compiled=compiled, **kind), packs)[0])
        still, _ = losses_and_gradients(network(compiled=False, **kind), packs)
    assert drawn[0].equal(drawn[1])
    assert not torch.allclose(drawn[0], still, rtol=1e-3)
    if how == "compiled":  # on a CPU, as without
        torch.testing.assert_close(drawn[0], drawn[2], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("gpu", "has", "environment", "needs"),
    [
        (False, {"g++", "clang++"}, {}, None),
        (False, {"gcc"}, {}, "C++ compiler"),
        (False, {"g++", "clang++"}, {"CXX": "icpx"}, "icpx"),
        (True, {"gcc", "triton"}, {}, None),
        (True, {"gcc"}, {}, "Triton"),
        (True, {"triton"}, {}, "C compiler"),
    ],
    ids=["CPU", "CPU, no C++", "CPU, another asked for", "GPU", "GPU, no Triton", "GPU, no C"],
)
def test_what_is_missing_is_named_before_anything_starts(gpu, has, environment, needs, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(fusion.shutil, "which", lambda name: name if name in has else None)
    monkeypatch.setattr(fusion.importlib.util, "find_spec", lambda name: name if name in has else None)
    monkeypatch.setattr(fusion.Path, "is_file", lambda path: True)
    for name in ("CC", "CXX"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    if needs is None:
        fusion.check_compiler()
        return
    with pytest.raises(UsageError, match=r"compile=true: .* needs .*install it, or leave") as refused:
        fusion.check_compiler()
    assert needs in str(refused.value)
    assert "\n" not in str(refused.value)
