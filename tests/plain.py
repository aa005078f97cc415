# SPDX-License-Identifier: Apache-2.0
"""The network without packing: cells padded to the longest, attention under a mask, a head on every token."""

import math
from unittest import mock

import torch

from megacell.geneformer.model.bert import Pack, PackedBert
from megacell.training.nn import packed_attention as attention


class PlainBert(PackedBert):
    """`PackedBert` with the same weights, computed the long way, in one process."""

    def forward(self, pack: Pack) -> torch.Tensor:
        """Return the cross-entropy [M] at the masked positions."""
        lengths = pack.cu_seqlens.diff().long()
        real = torch.arange(pack.max_seqlen)[None] < lengths[:, None]  # [cells, longest]

        def masked(query, key, value, packed, dropout):
            q, k, v = (
                x.unflatten(0, real.shape).transpose(1, 2) for x in (query, key, value)
            )  # [cells, H, longest, D]
            scores = (q @ k.transpose(2, 3) / math.sqrt(q.shape[-1])).masked_fill(~real[:, None, None], -math.inf)
            return (torch.softmax(scores, -1) @ v).transpose(1, 2).flatten(0, 1)

        def padded(values):
            return torch.zeros(real.shape, dtype=torch.int64).masked_scatter(real, values).flatten()

        none = torch.zeros(0, dtype=torch.int64)
        bounds = torch.arange(len(lengths) + 1, dtype=torch.int32) * pack.max_seqlen
        cells = Pack(padded(pack.tokens), padded(pack.positions), bounds, pack.max_seqlen, none, none)
        with mock.patch.dict(attention.BACKENDS, sequences=masked):
            logits = self.logits(self.encode(cells))  # at every token, pad tokens too
        labels = torch.full_like(pack.tokens, -100)
        labels[pack.masked] = pack.labels
        losses = torch.nn.functional.cross_entropy(
            logits, torch.full(real.shape, -100).masked_scatter(real, labels).flatten(), reduction="none"
        )
        return losses[real.flatten()][pack.masked]
