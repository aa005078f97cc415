# SPDX-License-Identifier: Apache-2.0
"""Packed attention against a padded reference with an explicit mask; the masked-only head against the whole one."""

import math
import re
import sys
from itertools import pairwise
from types import ModuleType

import numpy as np
import pytest
import torch
from megatron.core import parallel_state
from megatron.core.packed_seq_params import PackedSeqParams

from megacell.core.errors import UsageError
from megacell.geneformer.model.bert import Pack, PackedBert
from megacell.geneformer.model.config import ModelConfig
from megacell.geneformer.model.initial_weights import PADDING_BIAS
from megacell.training.distributed import device
from megacell.training.nn import attention_backends as backends
from megacell.training.nn import packed_attention as attention
from megacell.training.nn.cross_entropy import cut_cross_entropy
from megacell.training.nn.layout import ATTENTIONS, Layout

LENGTHS = (1, 7, 40, 2, 19)
HEADS, SIZE = 4, 8


def padded_attention(query, key, value, lengths):
    """Softmax attention over cells padded to the longest, with an additive mask: written out, no SDPA."""
    longest, starts = max(lengths), [0, *np.cumsum(lengths)]
    real = torch.arange(longest)[None] < torch.tensor(lengths)[:, None]  # [cells, longest]

    def padded(x):
        fill = x.new_full((longest, HEADS, SIZE), 3.0)
        return torch.stack([torch.cat([x[a:b], fill[b - a :]]) for a, b in pairwise(starts)])

    q, k, v = (padded(x).transpose(1, 2) for x in (query, key, value))
    scores = q @ k.transpose(2, 3) / math.sqrt(SIZE)
    scores = scores.masked_fill(~real[:, None, None], -math.inf)
    out = (torch.softmax(scores, -1) @ v).transpose(1, 2)
    return out[real]


@pytest.fixture
def tensors():
    """Query, key, value and a weight for each output: float64 [T, H, D]."""
    generator = torch.Generator().manual_seed(0)
    shape = (4, sum(LENGTHS), HEADS, SIZE)
    return [x.clone().requires_grad_() for x in torch.randn(shape, generator=generator, dtype=torch.float64) * 2]


def packed() -> PackedSeqParams:
    bounds = torch.tensor(np.concatenate([[0], np.cumsum(LENGTHS)]), dtype=torch.int32)
    return PackedSeqParams("thd", bounds, bounds, max_seqlen_q=max(LENGTHS), max_seqlen_kv=max(LENGTHS))


def output_and_gradients(attend, tensors, dtype):
    """The output, and the gradients of a weighted sum of it."""
    query, key, value, weights = (x.detach().to(dtype).requires_grad_() for x in tensors)
    out = attend(query, key, value)
    (out * weights).sum().backward()
    return [out.detach(), query.grad, key.grad, value.grad]


def distance(one, other) -> float:
    """Relative to the norm of the other."""
    return float((one.double() - other.double()).norm() / other.double().norm())


@pytest.mark.parametrize("backend", ["sequences", "padded"])
@pytest.mark.parametrize(("dtype", "most"), [(torch.float32, 1e-6), (torch.float64, 1e-14)], ids=["float32", "float64"])
def test_attention_and_its_gradients_equal_a_padded_masked_reference(backend, dtype, most, tensors):
    run = lambda q, k, v: attention.BACKENDS[backend](q, k, v, packed(), 0.0)  # noqa: E731
    ours = output_and_gradients(run, tensors, dtype)
    reference = output_and_gradients(lambda q, k, v: padded_attention(q, k, v, LENGTHS), tensors, torch.float64)
    for one, other in zip(ours, reference, strict=True):
        assert one.shape == (sum(LENGTHS), HEADS, SIZE)
        assert distance(one, other) <= most


def test_all_backends_agree(tensors):
    one, other = (
        output_and_gradients(lambda q, k, v, b=b: attention.BACKENDS[b](q, k, v, packed(), 0.0), tensors, torch.float32)
        for b in ("sequences", "padded")
    )
    for ours, theirs in zip(one, other, strict=True):
        assert distance(ours, theirs) <= 1e-6


@pytest.mark.parametrize("backend", ["sequences", "padded"])
def test_attention_dropout_drops_and_keeps_the_mean(backend, tensors):
    query, key, value, _ = (x.detach().float() for x in tensors)
    torch.manual_seed(3)
    whole = attention.BACKENDS[backend](query, key, value, packed(), 0.0)
    drawn = torch.stack([attention.BACKENDS[backend](query, key, value, packed(), 0.3) for _ in range(100)])
    assert (drawn[0] != whole).any()
    spread = drawn.std(0) / math.sqrt(len(drawn))
    assert ((drawn.mean(0) - whole).abs() < 6 * spread + 1e-6).all()


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("size", [64, 20], ids=["a size the kernel takes", "a size that is filled up"])
@pytest.mark.parametrize(
    ("backend", "dtype"),
    [("flash", torch.bfloat16), ("flash", torch.float16), ("efficient", torch.bfloat16), ("efficient", torch.float32)],
    ids=str,
)
def test_a_gpus_kernel_is_asked_for_heads_it_takes_and_gives_those_of_the_query(
    backend, dtype, size, dropout, monkeypatch
):
    """On tensors without memory: torch checks the call and tells shapes, and nothing is computed."""
    bounds = packed()
    bounds.cu_seqlens_q = bounds.cu_seqlens_q.to("meta")
    mixed = torch.empty(sum(LENGTHS), HEADS, 3 * size, dtype=dtype, device="meta", requires_grad=True)
    operation = f"_{backend}_attention_forward"
    real, given = getattr(torch.ops.aten, operation), []

    def call(*args, **named):
        given.append((args, named))
        return real(*args, **named)

    monkeypatch.setattr(torch.ops.aten, operation, call)
    out = attention.BACKENDS[backend](*mixed.split(size, dim=-1), bounds, dropout)
    ((args, named),) = given
    filled = (sum(LENGTHS), HEADS, math.ceil(size / 8) * 8)
    assert [x.shape for x in args[:3]] == [filled if backend == "flash" else (1, *filled)] * 3
    assert named["scale"] == 1 / math.sqrt(size)  # that of the heads before they were filled up
    assert args[7 if backend == "flash" else 8] == dropout
    assert (out.shape, out.dtype) == ((sum(LENGTHS), HEADS, size), dtype)
    if backend == "flash":  # of the other torch 2.13 cannot tell the gradients' shapes: it leaves an argument out
        out.sum().backward()
        assert mixed.grad.shape == mixed.shape


def test_heads_that_are_filled_up_attend_as_before(tensors):
    query, key, value = (x.detach()[..., :5] for x in tensors[:3])
    filled = backends._multiple_of_8(query, key, value)
    assert all(x.shape[-1] == 8 for x in filled)
    attend = lambda q, k, v: torch.softmax(q @ k.transpose(1, 2) / math.sqrt(5), -1) @ v  # noqa: E731
    ours = attend(*(x.transpose(0, 1) for x in filled))
    assert not ours[..., 5:].any()
    assert distance(ours[..., :5], attend(*(x.transpose(0, 1) for x in (query, key, value)))) <= 1e-14
    assert backends._multiple_of_8(*tensors[:3])[0] is tensors[0]


@pytest.mark.parametrize(
    ("where", "dtype", "backend"),
    [
        ("cpu", torch.float32, "sequences"),
        ("cpu", torch.bfloat16, "sequences"),
        ("cuda", torch.float32, "efficient"),
        ("cuda", torch.bfloat16, "flash"),
        ("cuda", torch.float16, "flash"),
    ],
)
def test_the_backend_is_one_that_is_exact_there(where, dtype, backend):
    assert attention.choose_backend(torch.device(where), dtype) == backend


def test_the_attentions_that_can_be_asked_for_are_those_that_there_are():
    assert ("auto", *attention.BACKENDS) == ATTENTIONS
    for asked in attention.BACKENDS:
        assert attention.choose_backend(torch.device("cpu"), torch.float32, asked) == asked


@pytest.mark.parametrize(
    ("asked", "gpu", "precision", "reason"),
    [
        ("auto", False, "fp32", None),
        ("sequences", False, "bf16", None),
        ("padded", True, "fp32", None),
        ("flash", True, "bf16", None),
        ("flash", False, "bf16", "a GPU"),
        ("flash", True, "fp32", "precision=bf16"),
        ("efficient", True, "fp32", None),
        ("efficient", True, "fp16", None),
        ("efficient", False, "fp32", "a GPU"),
        ("cudnn", True, "bf16", None),
        ("cudnn", False, "bf16", "a GPU"),
        ("cudnn", True, "fp32", "precision=bf16"),
        ("cudnn", True, "bf16", "not installed: pip install 'nvidia-cudnn-frontend'"),
        ("transformer_engine", True, "fp16", None),
        ("transformer_engine", False, "fp16", "a GPU"),
        ("transformer_engine", True, "fp32", "precision=bf16"),
        ("transformer_engine", True, "bf16", "not installed: pip install 'transformer-engine[pytorch]'"),
    ],
)
def test_an_attention_that_cannot_run_is_refused(asked, gpu, precision, reason, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    absent = bool(reason) and reason.startswith("not installed")
    monkeypatch.setattr(backends.importlib.util, "find_spec", lambda name: None if absent else name)
    if reason is None:
        backends.check_backend(asked, precision)
        return
    with pytest.raises(UsageError, match=f"attention={asked}: .*{re.escape(reason)}.*attention=auto"):
        backends.check_backend(asked, precision)


class StandIn:
    """Takes what Transformer Engine's ``DotProductAttention`` takes, checks it as that does, and computes padded."""

    def __init__(
        self, num_attention_heads, kv_channels, num_gqa_groups=None, attention_dropout=0.0, qkv_format="sbhd",
        attn_mask_type="causal", attention_type="self",
    ):  # fmt: skip
        assert (qkv_format, attn_mask_type, attention_type) == ("thd", "padding", "self")
        self.heads, self.size, self.dropout = num_attention_heads, kv_channels, attention_dropout

    def __call__(
        self, query, key, value, attention_mask=None, *, cu_seqlens_q, cu_seqlens_kv, max_seqlen_q, max_seqlen_kv
    ):
        assert attention_mask is None
        assert query.shape == key.shape == value.shape == (len(query), self.heads, self.size)
        assert cu_seqlens_q.dtype == torch.int32
        assert cu_seqlens_q.equal(cu_seqlens_kv)
        assert cu_seqlens_q[-1] == len(query)
        assert max_seqlen_q == max_seqlen_kv == int(cu_seqlens_q.diff().max())
        bounds = PackedSeqParams("thd", cu_seqlens_q, max_seqlen_q=max_seqlen_q)
        return attention.BACKENDS["padded"](query, key, value, bounds, self.dropout).flatten(1)


def test_transformer_engine_is_called_as_it_is_documented(tensors, monkeypatch):
    engine = ModuleType("transformer_engine.pytorch")
    engine.DotProductAttention = StandIn
    monkeypatch.setitem(sys.modules, "transformer_engine", ModuleType("transformer_engine"))
    monkeypatch.setitem(sys.modules, "transformer_engine.pytorch", engine)
    backends._transformer_engine_of.cache_clear()
    run = lambda q, k, v, rate=0.0: attention.BACKENDS["transformer_engine"](q, k, v, packed(), rate)  # noqa: E731
    ours = output_and_gradients(run, tensors, torch.float64)
    reference = output_and_gradients(lambda q, k, v: padded_attention(q, k, v, LENGTHS), tensors, torch.float64)
    for one, other in zip(ours, reference, strict=True):
        assert distance(one, other) <= 1e-14
    assert distance(run(*tensors[:3], 0.5), ours[0]) > 0.01  # the rate arrives
    backends._transformer_engine_of.cache_clear()


@pytest.mark.cuda
@pytest.mark.parametrize(
    ("backend", "dtype", "most"),
    [(name, dtype, most)
     for name in attention.BACKENDS
     for dtype, most in ((torch.float32, 1e-5), (torch.bfloat16, 0.02), (torch.float16, 0.02))
     if dtype is not torch.float32 or name in ("sequences", "efficient", "padded")],
    ids=str,
)  # fmt: skip
def test_attention_on_a_gpu_equals_the_padded_reference(tensors, backend, dtype, most):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    if module := {"transformer_engine": "transformer_engine.pytorch", "cudnn": "cudnn"}.get(backend):
        pytest.importorskip(module, exc_type=ImportError)
    bounds = packed()
    bounds.cu_seqlens_q = bounds.cu_seqlens_q.cuda()
    run = lambda q, k, v: attention.BACKENDS[backend](q, k, v, bounds, 0.0)  # noqa: E731
    ours = output_and_gradients(run, [x.detach().cuda() for x in tensors], dtype)
    rounded = [x.detach().to(dtype).double() for x in tensors]
    reference = output_and_gradients(lambda q, k, v: padded_attention(q, k, v, LENGTHS), rounded, torch.float64)
    for one, other in zip(ours, reference, strict=True):
        assert distance(one.cpu(), other) <= most


# the network over a pack


@pytest.fixture(scope="module")
def model(model_for, vocabulary_for):
    return model_for(vocabulary_for(genes=100, max_length=64))


def pack_of(cells: list[np.ndarray], masked: np.ndarray, labels: np.ndarray) -> Pack:
    lengths = [len(cell) for cell in cells]
    starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    arrays = (np.concatenate(cells), np.concatenate([np.arange(n) for n in lengths]), starts)
    return Pack(*map(torch.from_numpy, arrays), max(lengths), torch.from_numpy(masked), torch.from_numpy(labels))


@pytest.fixture
def pack():
    draw = np.random.default_rng(0)
    cells = [draw.integers(4, 104, n) for n in LENGTHS]
    masked = np.sort(draw.choice(sum(LENGTHS), 15, replace=False))
    return pack_of(cells, masked, draw.integers(4, 104, 15))


def test_the_masked_only_head_gives_the_losses_of_the_whole_one(model, pack):
    with device.single_process(), torch.no_grad():
        ours = model.bert(pack)
        logits = model.bert.logits(model.bert.encode(pack))  # at every token
    assert logits.shape == (sum(LENGTHS), 128)  # 104 tokens, padded
    expected = torch.nn.functional.cross_entropy(logits.double(), everywhere(pack), reduction="none")[pack.masked]
    torch.testing.assert_close(ours.double(), expected, rtol=1e-6, atol=1e-6)


def test_the_masked_only_head_gives_the_gradients_of_the_whole_one(model, pack):
    with device.single_process():
        model.bert.zero_grad()
        model.bert(pack).sum().backward()
        ours = {name: p.grad.clone() for name, p in model.bert.named_parameters()}
        model.bert.zero_grad()
        logits = model.bert.logits(model.bert.encode(pack))
        chosen = torch.zeros(len(logits)).index_fill_(0, pack.masked, 1.0)
        losses = torch.nn.functional.cross_entropy(logits, everywhere(pack), reduction="none")
        (losses * chosen).sum().backward()
        for name, parameter in model.bert.named_parameters():
            scale = float(parameter.grad.abs().max())
            assert scale > 0, name
            torch.testing.assert_close(
                ours[name], parameter.grad, rtol=0, atol=1e-5 * scale, msg=lambda m, n=name: n + m
            )
        model.bert.zero_grad()


def everywhere(pack: Pack) -> torch.Tensor:
    """Return labels at every token; what stands where nothing is masked does not matter."""
    labels = torch.full((len(pack.tokens),), 4)
    labels[pack.masked] = pack.labels
    return labels


def test_rows_that_pad_the_vocabulary_take_no_probability(model, pack):
    with device.single_process(), torch.no_grad():
        logits = model.bert.logits(model.bert.encode(pack))
    assert float(torch.softmax(logits.double(), -1)[:, 104:].sum(-1).max()) == 0
    assert float(model.bert.output_layer.bias[104:].max()) == PADDING_BIAS


def test_a_cells_states_do_not_depend_on_the_cells_beside_it(model, pack):
    with device.single_process(), torch.no_grad():
        together = model.bert.encode(pack)
        starts = pack.cu_seqlens.tolist()
        none = np.zeros(0, np.int64)
        for a, b in pairwise(starts):
            alone = model.bert.encode(pack_of([pack.tokens[a:b].numpy()], none, none))
            torch.testing.assert_close(together[a:b], alone, rtol=0, atol=1e-5)


def test_the_order_of_a_cells_genes_matters(model, pack):
    none = np.zeros(0, np.int64)
    cell = pack.tokens[8:48].numpy()
    with device.single_process(), torch.no_grad():
        one, other = (model.bert.encode(pack_of([c], none, none)).mean(0) for c in (cell, cell[::-1].copy()))
    assert float((one - other).norm() / one.norm()) > 0.01


@pytest.mark.parametrize("norm", ["pre", "post"])
def test_where_nothing_is_learned_biases_are_added_at_once_to_the_same_states(norm, pack, monkeypatch):
    sizes = ModelConfig(
        layers=2, hidden=32, ffn=64, heads=4, max_length=64, vocabulary_size=104, norm=norm, activation="gelu",
        tied_head=True, hidden_dropout=0.1, attention_dropout=0.1, layernorm_epsilon=1e-12, init_std=0.02,
        scaled_init=False,
    )  # fmt: skip
    generator, shapes = torch.Generator().manual_seed(0), []
    linear = torch.nn.functional.linear
    with device.single_process():
        bert = PackedBert(sizes, Layout()).eval()
        with torch.no_grad():
            for parameter in bert.parameters():
                parameter.normal_(0.0, 0.3, generator=generator)
            after = bert.encode(pack)
        monkeypatch.setattr(
            torch.nn.functional, "linear", lambda x, w, b=None: shapes.append(tuple(w.shape)) or linear(x, w, b)
        )
        with torch.inference_mode():
            once = bert.encode(pack)
    assert shapes == [(96, 32), (32, 32), (64, 32), (32, 64)] * 2
    assert distance(once, after) < 1e-6


# the loss, and what is kept for the backward pass


@pytest.mark.parametrize("rows", [0, 1, 64, 150], ids=lambda n: f"{n} masked genes")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_loss_and_its_gradient_equal_cross_entropy_in_float64(rows, dtype):
    generator = torch.Generator().manual_seed(0)
    logits = (4 * torch.randn(rows, 300, generator=generator)).to(dtype)
    labels, weights = torch.randint(300, (rows,), generator=generator), torch.rand(rows, generator=generator)
    exact = logits.double().requires_grad_()
    expected = torch.nn.functional.cross_entropy(exact, labels, reduction="none")
    (expected * weights).sum().backward()
    ours = logits.clone().requires_grad_()
    with device.single_process():
        losses = cut_cross_entropy(ours * 1, labels, parallel_state.get_tensor_model_parallel_group())
        (losses * weights).sum().backward()
    assert losses.dtype == torch.float32
    torch.testing.assert_close(losses.double(), expected.detach(), rtol=1e-6, atol=1e-5)
    assert ours.grad.dtype == dtype
    torch.testing.assert_close(ours.grad.double(), exact.grad, rtol=0, atol=max(1e-6, torch.finfo(dtype).eps))


def test_the_loss_keeps_the_logits_and_a_few_numbers_a_row():
    kept = {}
    logits = torch.randn(200, 1000, dtype=torch.bfloat16).requires_grad_() * 1
    keep = lambda tensor: (kept.update({tensor.data_ptr(): tensor}), tensor)[1]  # noqa: E731
    with device.single_process(), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        losses = cut_cross_entropy(
            logits, torch.zeros(200, dtype=int), parallel_state.get_tensor_model_parallel_group()
        )
        losses.sum().backward()
    assert logits.data_ptr() in kept
    assert sum(tensor.nbytes for tensor in kept.values()) <= logits.nbytes + 200 * 20


@pytest.mark.parametrize(("recompute", "times"), [("none", 1), ("selective", 2), ("full", 2)])
@pytest.mark.parametrize("norm", ["pre", "post"])
def test_recomputing_runs_attention_again_in_the_backward_pass(norm, recompute, times, pack, monkeypatch):
    calls = []
    attend = attention.BACKENDS["sequences"]
    monkeypatch.setitem(attention.BACKENDS, "sequences", lambda *a: (calls.append(1), attend(*a))[1])
    sizes = {"layers": 3, "hidden": 32, "ffn": 64, "heads": 4, "max_length": 64, "vocabulary_size": 104}
    options = {"norm": norm, "activation": "gelu", "tied_head": True, "hidden_dropout": 0.1, "attention_dropout": 0.1,
               "layernorm_epsilon": 1e-12, "init_std": 0.02, "scaled_init": True}  # fmt: skip
    with device.single_process():
        bert = PackedBert(ModelConfig(**sizes, **options), Layout(recompute=recompute))
        device.seed_step(0, 0)
        losses = bert(pack)
        assert len(calls) == 3
        losses.sum().backward()
    assert len(calls) == 3 * times
