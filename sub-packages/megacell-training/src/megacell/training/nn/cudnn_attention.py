# SPDX-License-Identifier: Apache-2.0
"""Attention within cells by cuDNN's kernel, which uses Hopper's own instructions and has dropout.

cuDNN plans a kernel for fixed shapes. Numbers of cells, lengths and tokens are therefore rounded up here, so that a run
needs few plans: cells without a token are added at the end, and a plan is made for the longest cell and the most tokens
that share it. The dropout of a call is a function of one random number, which is drawn on the device. None of this has
been run on a GPU yet.

Shapes: T tokens of the pack, H heads of this rank, D size of a head, C cells of a plan, S longest cell of a plan.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

CELLS, LONGEST, TOKENS = 32, 512, 32_768  # a plan's sizes are multiples of these
_NAMES = (
    "q", "k", "v", "o", "stats", "d_o", "d_q", "d_k", "d_v", "lengths", "in_offsets", "out_offsets", "stats_offsets",
    "seed", "offset",
)  # fmt: skip
UID = {name: number for number, name in enumerate(_NAMES, 1)}


@dataclass(frozen=True)
class _Sizes:
    """What a plan depends on; ``tokens`` at most, strides of query, key and value between tokens and heads."""

    cells: int
    longest: int
    tokens: int
    heads: int
    size: int
    token_stride: int
    head_stride: int
    dtype: torch.dtype
    dropout: float
    deterministic: bool
    device: int


class _Bounds:
    """A pack's cells as cuDNN wants them: lengths int32 [C], and where they start, int64 [C + 1]."""

    def __init__(self, bounds: torch.Tensor):
        missing = -(len(bounds) - 1) % CELLS
        whole = torch.cat([bounds, bounds[-1:].expand(missing)])
        self.lengths, self._starts = whole.diff().int(), whole.long()
        self._offsets: dict[int, torch.Tensor] = {}

    @classmethod
    def of(cls, packed: Any) -> "_Bounds":
        """Return those of a pack, made once for all layers."""
        if not hasattr(packed, "cudnn_bounds"):
            packed.cudnn_bounds = cls(packed.cu_seqlens_q)
        bounds: _Bounds = packed.cudnn_bounds
        return bounds

    def offsets(self, elements: int) -> torch.Tensor:
        """Return where cells start, for tokens of so many elements."""
        if elements not in self._offsets:
            self._offsets[elements] = self._starts * elements
        return self._offsets[elements]


@cache
def _handle(device: int) -> Any:
    import cudnn

    return cudnn.create_handle()


class _Plan:
    """A graph of cuDNN under construction: its tensors, and how it is run."""

    def __init__(self, sizes: _Sizes):
        import cudnn

        self.sizes, self.library, self.handle = sizes, cudnn, _handle(sizes.device)
        self.type = {torch.bfloat16: cudnn.data_type.BFLOAT16, torch.float16: cudnn.data_type.HALF}[sizes.dtype]
        cudnn.set_stream(handle=self.handle, stream=torch.cuda.current_stream().cuda_stream)
        self.graph = cudnn.pygraph(
            io_data_type=self.type, intermediate_data_type=cudnn.data_type.FLOAT,
            compute_data_type=cudnn.data_type.FLOAT, handle=self.handle,
        )  # fmt: skip
        whole = (sizes.cells, 1, 1, 1)
        self.lengths = self._tensor("lengths", whole, (1, 1, 1, 1), cudnn.data_type.INT32)
        ends = (sizes.cells + 1, 1, 1, 1)
        self.offsets = {
            name: self._tensor(f"{name}_offsets", ends, (1, 1, 1, 1), cudnn.data_type.INT64)
            for name in ("in", "out", "stats")
        }
        self.dropout = None
        if sizes.dropout:
            number = ((1, 1, 1, 1), (1, 1, 1, 1), cudnn.data_type.INT64)
            self.dropout = (sizes.dropout, self._tensor("seed", *number), self._tensor("offset", *number))

    def _tensor(self, name: str, dim: tuple[int, ...], stride: tuple[int, ...], data_type: Any) -> Any:
        return self.graph.tensor(uid=UID[name], dim=dim, stride=stride, data_type=data_type)

    def _layout(self, kind: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return size and strides of what lies like query ("in"), like the output ("out") or a figure a row."""
        s = self.sizes
        last = 1 if kind == "stats" else s.size
        head, token = {"in": (s.head_stride, s.token_stride), "out": (s.size, s.heads * s.size), "stats": (1, s.heads)}[
            kind
        ]
        return (s.cells, s.heads, s.longest, last), (s.longest * token, head, token, 1)

    def given(self, name: str, kind: str) -> Any:
        """Return a tensor that a run brings."""
        data_type = self.library.data_type.FLOAT if kind == "stats" else self.type
        tensor = self._tensor(name, *self._layout(kind), data_type)
        tensor.set_ragged_offset(self.offsets[kind])
        return tensor

    def result(self, tensor: Any, name: str, kind: str) -> None:
        """Say where a tensor is to be written."""
        dim, stride = self._layout(kind)
        tensor.set_uid(UID[name]).set_output(True).set_dim(dim).set_stride(stride)
        if kind == "stats":
            tensor.set_data_type(self.library.data_type.FLOAT)
        tensor.set_ragged_offset(self.offsets[kind])

    def ready(self) -> "_Plan":
        """Have cuDNN choose and build a kernel; RuntimeError of cuDNN where it has none."""
        modes = self.library.heur_mode
        self.graph.build([modes.A, modes.FALLBACK])
        self.workspace = self.graph.get_workspace_size()
        return self

    def run(self, bounds: _Bounds, drawn: torch.Tensor | None, **tensors: torch.Tensor) -> None:
        """Run on the current stream."""
        s = self.sizes
        known = {UID[name]: tensor for name, tensor in tensors.items()}
        known |= {
            UID["lengths"]: bounds.lengths,
            UID["in_offsets"]: bounds.offsets(s.token_stride),
            UID["out_offsets"]: bounds.offsets(s.heads * s.size),
            UID["stats_offsets"]: bounds.offsets(s.heads),
        }
        if drawn is not None:
            known |= {UID["seed"]: drawn[:1], UID["offset"]: drawn[1:]}
        device = tensors["q"].device
        workspace = torch.empty(self.workspace, dtype=torch.uint8, device=device)
        self.library.set_stream(handle=self.handle, stream=torch.cuda.current_stream(device).cuda_stream)
        self.graph.execute(known, workspace, handle=self.handle)


@cache
def _forward(sizes: _Sizes, training: bool) -> _Plan:
    plan = _Plan(sizes)
    out, stats = plan.graph.sdpa(
        name="attention", q=plan.given("q", "in"), k=plan.given("k", "in"), v=plan.given("v", "in"),
        generate_stats=training, attn_scale=1 / math.sqrt(sizes.size), use_padding_mask=True,
        seq_len_q=plan.lengths, seq_len_kv=plan.lengths, dropout=plan.dropout,
    )  # fmt: skip
    plan.result(out, "o", "out")
    if training:
        plan.result(stats, "stats", "stats")
    return plan.ready()


@cache
def _backward(sizes: _Sizes) -> _Plan:
    plan = _Plan(sizes)
    gradients = plan.graph.sdpa_backward(
        name="attention_backward", q=plan.given("q", "in"), k=plan.given("k", "in"), v=plan.given("v", "in"),
        o=plan.given("o", "out"), dO=plan.given("d_o", "out"), stats=plan.given("stats", "stats"),
        attn_scale=1 / math.sqrt(sizes.size), use_padding_mask=True, seq_len_q=plan.lengths, seq_len_kv=plan.lengths,
        max_total_seq_len_q=sizes.tokens, max_total_seq_len_kv=sizes.tokens, dropout=plan.dropout,
        use_deterministic_algorithm=sizes.deterministic,
    )  # fmt: skip
    for tensor, name in zip(gradients, ("d_q", "d_k", "d_v"), strict=True):
        plan.result(tensor, name, "in")
    return plan.ready()


def _up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


class _CudnnAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        packed: Any,
        dropout: float,
        training: bool,
    ) -> torch.Tensor:
        tokens, heads, size = query.shape
        bounds = _Bounds.of(packed)
        sizes = _Sizes(
            len(bounds.lengths), _up(packed.max_seqlen_q, LONGEST), _up(tokens, TOKENS), heads, size,
            query.stride(0), query.stride(1), query.dtype, dropout, torch.are_deterministic_algorithms_enabled(),
            query.device.index,
        )  # fmt: skip
        out = query.new_empty(query.shape)
        drawn = None
        if dropout:  # a function of the random state, without a wait for the device
            drawn = query.new_zeros(2, dtype=torch.int64)  # seed and offset
            drawn[:1].random_()
        kept = {"stats": query.new_empty(tokens, heads, 1, dtype=torch.float32)} if training else {}
        _forward(sizes, training).run(bounds, drawn, q=query, k=key, v=value, o=out, **kept)
        if training:
            ctx.save_for_backward(query, key, value, out, kept["stats"])
            ctx.bounds, ctx.drawn, ctx.sizes = bounds, drawn, sizes
        return out

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        query, key, value, out, stats = ctx.saved_tensors
        tokens, heads, size = query.shape
        mixed = query.new_empty(tokens, heads, ctx.sizes.head_stride)
        assert mixed.stride(0) == ctx.sizes.token_stride
        d_q, d_k, d_v = (mixed[..., i * size : (i + 1) * size] for i in range(3))
        _backward(ctx.sizes).run(
            ctx.bounds, ctx.drawn, q=query, k=key, v=value, o=out, stats=stats, d_o=gradient.contiguous(),
            d_q=d_q, d_k=d_k, d_v=d_v,
        )  # fmt: skip
        return d_q, d_k, d_v, None, None, None


def attend_cudnn(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, packed: Any, dropout: float
) -> torch.Tensor:
    """Attend as every backend does; query, key and value as parts of one tensor [T, H, 3 D], or copied into one."""
    heads, size = query.shape[1:]
    parts: tuple[torch.Tensor, ...] = (query, key, value)
    if any(x.stride() != (heads * 3 * size, 3 * size, 1) for x in parts):
        parts = torch.cat(parts, dim=-1).split(size, dim=-1)
    apply: Callable[..., torch.Tensor] = _CudnnAttention.apply
    return apply(*parts, packed, dropout, torch.is_grad_enabled())
