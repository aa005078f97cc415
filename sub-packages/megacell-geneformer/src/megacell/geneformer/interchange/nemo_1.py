# SPDX-License-Identifier: Apache-2.0
"""Megatron BERTs of NeMo 1 and BioNeMo 1 in: their .nemo files hold a Geneformer under other names.

The network is ours with pre-LN; query, key and value lie head by head as here. Their feed-forward layers take the
GELU of Megatron's fused kernel, which goes by tanh, unless fusion was off; the head's GELU is exact.
"""

import re
from pathlib import Path
from typing import Any

import torch

from megacell.core.errors import DataError, UsageError
from megacell.geneformer.model.config import ModelConfig
from megacell.geneformer.model.initial_weights import PADDING_BIAS
from megacell.geneformer.model.provenance import plain_name
from megacell.geneformer.model.tensor_shapes import BIAS, POSITIONS, WORDS, shapes_of
from megacell.geneformer.vocabulary.bionemo_dictionaries import make_vocabulary, read_tokens
from megacell.geneformer.vocabulary.vocabulary import Vocabulary
from megacell.training.foreign.plain import check_shape, shown
from megacell.training.interchange.safe_archive import MOST_MEMBERS, Archive
from megacell.training.interchange.tensors import Weights, check_tensors

CONFIG, WEIGHTS = "model_config.yaml", "model_weights.ckpt"
RENAMED = (  # theirs → ours, each where it stands; NeMo's later BERTs, on Megatron-core, have some of ours already
    ("language_model.", ""),
    ("query_key_value", "linear_qkv"),
    ("self_attention.dense.", "self_attention.linear_proj."),
    ("dense_h_to_4h", "linear_fc1"),
    ("dense_4h_to_h", "linear_fc2"),
    ("post_attention_layernorm", "pre_mlp_layernorm"),
    ("self_attention.linear_qkv.layer_norm_", "input_layernorm."),
    ("mlp.linear_fc1.layer_norm_", "pre_mlp_layernorm."),
    ("lm_head.layernorm", "lm_head.layer_norm"),
    ("lm_head.bias", "output_layer.bias"),
)
CUT = {  # along which dimension tensor parallel ranks shared a tensor out
    0: ("word_embeddings.weight", "linear_qkv.weight", "linear_qkv.bias", "linear_fc1.weight", "linear_fc1.bias",
        "output_layer.bias"),
    1: ("linear_proj.weight", "linear_fc2.weight"),
}  # fmt: skip
UNUSED = ("pooler.", "binary_head.", "output_layer.weight")  # the decoder is the embedding
SIZES = {  # what is computed with of their configuration, and its types
    "num_layers": int,
    "hidden_size": int,
    **dict.fromkeys(
        ("num_attention_heads?", "ffn_hidden_size?", "kv_channels?", "max_position_embeddings?",
         "tensor_model_parallel_size?", "make_vocab_size_divisible_by?"), int | None,
    ),
}  # fmt: skip
TYPES = "embedding.tokentype_embeddings.weight"
PADDED_TO = 128  # rows of the embedding, a tensor parallel rank
Tensors = dict[str, torch.Tensor]
RANK = re.compile(r"(?:tp|mp)_rank_(\d+)(?:_pp_rank_(\d+))?")


def is_nemo_1(cfg: dict[str, Any]) -> bool:
    """Return whether a model_config.yaml is that of a Megatron model of NeMo 1."""
    return "network" not in cfg and {"num_layers", "hidden_size"} <= set(cfg)


def read(
    archive: Archive, cfg: dict[str, Any], path: Path, given: Vocabulary | None
) -> tuple[dict, Weights, Vocabulary]:
    """Read a Megatron BERT.

    Parameters
    ----------
    archive : Archive
    cfg : dict
        Its model_config.yaml.
    path : Path
        For messages.
    given : Vocabulary, optional
        Of its tokens; else the one whose files lie in the archive.

    Returns
    -------
    cfg : dict
        As in a .nemo file of ours.
    weights : iterator of (str, Tensor)
        Whole, float32, under our names; checked already.
    vocabulary : Vocabulary

    Raises
    ------
    DataError, UsageError
        Another kind of network, damaged, or another vocabulary.
    """
    try:
        check_shape(cfg, SIZES)
    except ValueError as error:
        raise DataError(f"{path}: its {CONFIG} cannot be read: {error}") from None
    vocabulary = _vocabulary(archive, path, given)
    network = _sizes(cfg, path, vocabulary)
    state = _join(_parts(archive, cfg, path), path)
    _check(state, network, cfg, path)
    provenance = {"step": 0, "made": "imported", "from": plain_name(path.name), "format": "NeMo 1 Megatron BERT"}
    made = {"network": network.to_dict(), "precision": "fp32", "vocabulary": vocabulary.hash, "provenance": provenance}
    return made, _to_ours(state, network), vocabulary


def _vocabulary(archive: Archive, path: Path, given: Vocabulary | None) -> Vocabulary:
    tokens, medians = (
        next((name for name in sorted(archive.names) if name.endswith(end)), None) for end in (".vocab", "medians.json")
    )
    if given is None:
        if tokens is None or medians is None:
            raise UsageError(f"{path}: has no vocabulary and medians in it; give the --vocabulary it was trained with")
        places = (f"{path}: {tokens}", f"{path}: {medians}")
        return make_vocabulary(archive.read(tokens), archive.read(medians), *places)
    if tokens is not None:
        theirs = read_tokens(archive.read(tokens), f"{path}: {tokens}")
        ours = dict(zip(given.gene_ids.tolist(), given.tokens.tolist(), strict=True))
        differ = sum(ours.get(gene) != token for gene, token in theirs.items() if not gene.startswith("["))
        if differ:
            raise DataError(f"{path}: gives {differ:,} genes other tokens than vocabulary {given.name}; leave it out")
    return given


def _sizes(cfg: dict[str, Any], path: Path, vocabulary: Vocabulary) -> ModelConfig:
    """Return the network that a configuration describes; NeMo's defaults for what it does not say."""
    heads, hidden = cfg.get("num_attention_heads"), cfg["hidden_size"]
    on_core = bool(cfg.get("mcore_bert", False))
    wanted = {  # option: its default, and what it has to be
        "transformer_block_type": ("pre_ln", "pre_ln"),
        "normalization": ("layernorm", "layernorm"),
        "activation": ("gelu", "gelu"),
        "position_embedding_type": ("learned_absolute", "learned_absolute"),
        "bias": (True, True),
        "headscale": (False, False),
        "openai_gelu": (False, False),
        "megatron_legacy": (False, False),
        "share_embeddings_and_output_weights": (True, True),
        "pipeline_model_parallel_size": (1, 1),
    }
    for option, (default, value) in wanted.items():
        if (found := cfg.get(option, default)) != value:
            raise DataError(f"{path}: {option} is {shown(found)}, where a Geneformer has {value}; it cannot be read")
    if (channels := cfg.get("kv_channels")) and heads and channels * heads != hidden:
        raise DataError(f"{path}: kv_channels is {channels}, not hidden_size / num_attention_heads; it cannot be read")
    fused = cfg.get("bias_activation_fusion" if on_core else "bias_gelu_fusion", True)
    try:
        return ModelConfig.of({
            "layers": cfg["num_layers"], "hidden": hidden, "heads": heads,
            "ffn": cfg.get("ffn_hidden_size") or 4 * hidden,
            "max_length": cfg.get("max_position_embeddings"),
            "vocabulary_size": vocabulary.size,
            "norm": "pre", "activation": "gelu_tanh" if fused else "gelu", "tied_head": True,
            "hidden_dropout": cfg.get("hidden_dropout", 0.1), "attention_dropout": cfg.get("attention_dropout", 0.1),
            "layernorm_epsilon": cfg.get("layernorm_epsilon", 1e-5), "init_std": cfg.get("init_method_std", 0.02),
            "scaled_init": True,
        })  # fmt: skip
    except (UsageError, TypeError) as error:
        raise DataError(f"{path}: {error}") from None


def _parts(archive: Archive, cfg: dict[str, Any], path: Path) -> list[Tensors]:
    """Return the tensors of each tensor parallel rank, under our names."""
    files = sorted(name for name in archive.names if name.rpartition("/")[2] == WEIGHTS)
    ranks = [RANK.fullmatch(name.partition("/")[0]) for name in files if "/" in name]
    numbers = [int(rank[1]) for rank in ranks if rank]
    split = bool(numbers) and len(numbers) == len(files)
    tensor = _ranks(cfg, path)
    if any(rank is None or int(rank[2] or 0) for rank in ranks) or (
        numbers != list(range(tensor)) if split else files != [WEIGHTS]
    ):
        held = ", ".join(files[:4]) or "no weights"
        raise DataError(f"{path}: holds {held}, where {tensor} tensor parallel rank(s) should be; give the whole model")
    return [{_rename(name): tensor for name, tensor in archive.tensors(file).items()} for file in files]


def _ranks(cfg: dict[str, Any], path: Path) -> int:
    """Return how many tensor parallel ranks shared the weights out; DataError for more than files in an archive."""
    ranks: int = cfg.get("tensor_model_parallel_size") or 1
    if not 1 <= ranks <= MOST_MEMBERS:
        raise DataError(f"{path}: its {CONFIG} tells of {ranks:,} tensor parallel ranks; it cannot be read")
    return ranks


def _rename(name: str) -> str:
    name = name.removeprefix("model.").removeprefix("module.")
    for theirs, ours in RENAMED:
        name = name.replace(theirs, ours)
    return name


def _join(parts: list[Tensors], path: Path) -> Tensors:
    """Put together what tensor parallel ranks hold, which is let go; what is not cut is the first one's."""
    first, *others = parts
    if any(set(part) != set(first) for part in others):
        raise DataError(f"{path}: its tensor parallel ranks hold different tensors; give the whole model")
    cut = {end: dimension for dimension, ends in CUT.items() for end in ends}
    out = {}
    for name in list(first):
        pieces = [part.pop(name) for part in parts]
        dimension = next((d for end, d in cut.items() if name.endswith(end)), None)
        whole = not others or dimension is None or pieces[0].ndim <= dimension
        out[name] = pieces[0] if whole else torch.cat(pieces, dimension or 0)
    return out


def _check(state: Tensors, network: ModelConfig, cfg: dict[str, Any], path: Path) -> None:
    """Refuse tensors that are not the network's; its vocabulary is padded otherwise than ours."""
    multiple = max(1, cfg.get("make_vocab_size_divisible_by") or PADDED_TO) * _ranks(cfg, path)
    shapes = shapes_of(network, -(-network.vocabulary_size // multiple) * multiple)
    if TYPES in state:
        shapes[TYPES] = (2, network.hidden)
    check_tensors(state, shapes, str(path), CONFIG, UNUSED)


def _to_ours(state: Tensors, network: ModelConfig) -> Weights:
    """Yield the tensors in float32, the padding of the vocabulary cut to ours."""
    rows, spare = network.vocabulary_size, network.padded_vocabulary - network.vocabulary_size
    for name in shapes_of(network, network.padded_vocabulary):
        tensor = state[name].float()
        if name == POSITIONS and TYPES in state:
            tensor = tensor + state[TYPES][0].float()
        elif name == WORDS:
            tensor = torch.nn.functional.pad(tensor[:rows], (0, 0, 0, spare))
        elif name == BIAS:
            tensor = torch.nn.functional.pad(tensor[:rows], (0, spare), value=PADDING_BIAS)
        yield name, tensor
