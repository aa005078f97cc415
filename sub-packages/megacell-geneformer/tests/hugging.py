# SPDX-License-Identifier: Apache-2.0
"""Networks of Hugging Face with random weights, and the same cells as a pack and padded."""

import numpy as np
import torch
import transformers

from megacell.geneformer.model.bert import Pack
from megacell.geneformer.model.config import ModelConfig

VOCABULARY = 103
BOTH = {"layers": 3, "hidden": 32, "ffn": 64, "heads": 4, "max_length": 64, "vocabulary_size": VOCABULARY,
        "attention_dropout": 0.0, "layernorm_epsilon": 1e-12, "init_std": 0.02, "scaled_init": False}  # fmt: skip


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
