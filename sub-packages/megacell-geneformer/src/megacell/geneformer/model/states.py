# SPDX-License-Identifier: Apache-2.0
"""Hidden states and attention maps of single layers, read by hooks."""

import math
from itertools import pairwise
from typing import Any

import torch

from megacell.geneformer.model.bert import Pack
from megacell.training.nn.layers import PostNormLayer


def attention_maps(bert, pack, layer: int) -> list[torch.Tensor]:
    """Return the attention weights of one layer, cell by cell; of a model in one process, dropout off.

    Parameters
    ----------
    bert : PackedBert
    pack : Pack
        Of C cells.
    layer : int
        From 1.

    Returns
    -------
    list of Tensor, float32 [heads, tokens, tokens], C of them
        Each row sums to 1.
    """
    kept: list[torch.Tensor] = []

    def compute(module, given, named) -> None:
        query, key = (x.transpose(0, 1).float() for x in given[:2])  # [H, T, D]
        for a, b in pairwise(pack.cu_seqlens.tolist()):
            scores = query[:, a:b] @ key[:, a:b].transpose(1, 2) / math.sqrt(query.shape[-1])
            kept.append(torch.softmax(scores, -1))

    inner = bert.encoder.layers[layer - 1].self_attention.core_attention
    hook = inner.register_forward_pre_hook(compute, with_kwargs=True)
    try:
        bert.encode(pack)
    finally:
        hook.remove()
    return kept


def hidden_states(bert: Any, pack: Pack, layer: int) -> torch.Tensor:
    """Return the hidden states [T, h] after layer ``layer`` (0: the embeddings); after the last, behind its norm.

    In a post-LN network, as in Hugging Face's ``hidden_states``, a layer ends with its norm, which stands at the start
    of the next one here.
    """
    layers = bert.encoder.layers
    if layer == len(layers):
        return bert.encode(pack)
    post = isinstance(layers[layer], PostNormLayer)
    module = layers[layer].input_layernorm if post else layers[layer]

    def stop(module, given, named, out=None):
        raise _Reached(out if post else named["hidden_states"])

    register = module.register_forward_hook if post else module.register_forward_pre_hook
    hook = register(stop, with_kwargs=True)
    try:
        bert.encode(pack)
    except _Reached as reached:
        states = reached.states
    finally:
        hook.remove()
    return (states if isinstance(states, torch.Tensor) else states[0]).squeeze(1)


class _Reached(Exception):
    """The layer that was asked for is computed: those behind it need not be."""

    def __init__(self, states: Any) -> None:
        self.states = states
