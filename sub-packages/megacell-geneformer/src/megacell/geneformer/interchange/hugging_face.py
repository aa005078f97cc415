# SPDX-License-Identifier: Apache-2.0
"""Hugging Face's BERTs, in and out: a directory of config.json and weights, and what its tensors are called here.

`BertForMaskedLM` is post-LN, as Geneformer was published; `MegatronBertForMaskedLM` is pre-LN. Ours has one embedding
for positions, into which theirs for token types (all zero here) is folded, and each norm one place further on: see
`PostNormLayer`.
"""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from megacell.core import lock
from megacell.core.errors import DataError, UsageError
from megacell.core.files import TEMPORARY, flush_file, move_into_place
from megacell.geneformer.interchange.directory_tensors import WEIGHTS, find_tensors
from megacell.geneformer.interchange.model_card import model_card
from megacell.geneformer.model.config import ModelConfig
from megacell.geneformer.model.initial_weights import PADDING_BIAS
from megacell.geneformer.model.provenance import plain_name
from megacell.geneformer.vocabulary.vocabulary import Vocabulary, refuse_existing
from megacell.training.foreign.plain import read_json, shown
from megacell.training.interchange.tensors import Shapes, State, Weights, check_tensors

if TYPE_CHECKING:  # it brings NeMo with it
    from megacell.geneformer.model.geneformer_model import GeneformerModel

ARCHITECTURES = {"post": "BertForMaskedLM", "pre": "MegatronBertForMaskedLM"}
ACTIVATIONS = ("relu", "gelu")
MODEL_TYPES = {"post": "bert", "pre": "megatron-bert"}
CONFIG, VOCABULARY = "config.json", "vocabulary"
SIZES = {  # config.json's name → ours
    "num_hidden_layers": "layers",
    "hidden_size": "hidden",
    "intermediate_size": "ffn",
    "num_attention_heads": "heads",
    "max_position_embeddings": "max_length",
    "vocab_size": "vocabulary_size",
    "hidden_act": "activation",
    "hidden_dropout_prob": "hidden_dropout",
    "attention_probs_dropout_prob": "attention_dropout",
    "layer_norm_eps": "layernorm_epsilon",
    "initializer_range": "init_std",
}
UNUSED = ("bert.pooler.", "cls.seq_relationship.", "bert.embeddings.position_ids", "bert.embeddings.token_type_ids")
WORDS, POSITIONS = "bert.embeddings.word_embeddings.weight", "bert.embeddings.position_embeddings.weight"
TYPES, DECODER = "bert.embeddings.token_type_embeddings.weight", "cls.predictions.decoder"
BIAS = "cls.predictions.bias"
PUBLISHED_SIZES = {25_426: "geneformer-v1", 20_275: "geneformer-v2"}


# -- names


def _pairs(network: ModelConfig) -> Iterator[tuple[str, str]]:
    """Yield (ours, theirs) for all tensors that are the same in both."""
    layers, post = range(network.layers), network.norm == "post"
    layer = "bert.encoder.layer.{}."
    if post:
        first = ["bert.embeddings.LayerNorm", *(f"{layer}output.LayerNorm".format(i) for i in layers)]
    else:
        first = [*(f"{layer}attention.ln".format(i) for i in layers), "bert.encoder.ln"]
    modules = [
        ("lm_head.dense", "cls.predictions.transform.dense"),
        ("lm_head.layer_norm", "cls.predictions.transform.LayerNorm"),
        ("encoder.final_layernorm", first[-1]),
    ]
    for i in layers:
        here, there = f"encoder.layers.{i}.", layer.format(i)
        modules += [
            (f"{here}input_layernorm", first[i]),
            (f"{here}pre_mlp_layernorm", f"{there}attention.output.LayerNorm" if post else f"{there}ln"),
            (f"{here}self_attention.linear_proj", f"{there}attention.output.dense"),
            (f"{here}mlp.linear_fc1", f"{there}intermediate.dense"),
            (f"{here}mlp.linear_fc2", f"{there}output.dense"),
        ]
    for ours, theirs in modules:
        for kind in ("weight", "bias"):
            yield f"{ours}.{kind}", f"{theirs}.{kind}"


def _attentions(network: ModelConfig) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Yield (ours, theirs): query, key and value are one tensor here, head by head."""
    for i in range(network.layers):
        for kind in ("weight", "bias"):
            ours = f"encoder.layers.{i}.self_attention.linear_qkv.{kind}"
            which = ("query", "key", "value")
            yield ours, tuple(f"bert.encoder.layer.{i}.attention.self.{name}.{kind}" for name in which)


def to_ours(state: State, network: ModelConfig) -> Weights:
    """Yield Hugging Face's tensors (or gradients) in float32 under our names, rows padded to our vocabulary's.

    Raises
    ------
    KeyError
        A tensor that is not there.
    """

    def padded(name: str, value: float = 0.0) -> torch.Tensor:
        tensor = state[name].float()
        return torch.nn.functional.pad(tensor, (*[0, 0] * (tensor.ndim - 1), 0, padding), value=value)

    heads, padding = network.heads, network.padded_vocabulary - network.vocabulary_size
    biased = f"{DECODER}.bias" if not network.tied_head and f"{DECODER}.bias" in state else BIAS
    yield "embedding.word_embeddings.weight", padded(WORDS)
    yield "embedding.position_embeddings.weight", state[POSITIONS].float() + state[TYPES][0].float()
    yield "output_layer.bias", padded(biased, PADDING_BIAS)
    if not network.tied_head:
        yield "output_layer.weight", padded(f"{DECODER}.weight")
    for ours, single in _pairs(network):
        yield ours, state[single].float()
    for ours, three in _attentions(network):
        parts = [state[name].float().unflatten(0, (heads, -1)) for name in three]
        yield ours, torch.stack(parts, dim=1).flatten(0, 2)  # head, which, size


def to_theirs(weights: State, network: ModelConfig) -> dict[str, torch.Tensor]:
    """Return our whole tensors under Hugging Face's names; the padded rows are left out."""
    rows = network.vocabulary_size
    out = {
        WORDS: weights["embedding.word_embeddings.weight"][:rows],
        POSITIONS: weights["embedding.position_embeddings.weight"],
        TYPES: torch.zeros(2, network.hidden, dtype=weights["embedding.position_embeddings.weight"].dtype),
        BIAS: weights["output_layer.bias"][:rows],
    }
    if not network.tied_head:
        out[f"{DECODER}.weight"] = weights["output_layer.weight"][:rows]
        out[f"{DECODER}.bias"] = out[BIAS].clone()
    out |= {theirs: weights[ours] for ours, theirs in _pairs(network)}
    for ours, theirs in _attentions(network):
        parts = weights[ours].unflatten(0, (network.heads, 3, -1)).unbind(1)
        out |= {name: part.flatten(0, 1) for name, part in zip(theirs, parts, strict=True)}
    return out


# -- in


def read_sizes(path: Path) -> ModelConfig:
    """Read what a directory's ``config.json`` says of the network.

    Raises
    ------
    DataError
        No BERT for masked genes, or one that is built otherwise than ours can be.
    """
    file = path / CONFIG
    try:
        config = read_json(file)
    except (OSError, ValueError) as error:
        raise DataError(f"{file}: cannot be read ({error}); give a directory that save_pretrained wrote") from None
    if not isinstance(config, dict):
        raise DataError(f"{file}: holds no object; give a directory that save_pretrained wrote")
    names = config.get("architectures") or []
    norm = next((norm for norm, name in ARCHITECTURES.items() if names == [name]), None)
    if norm is None:
        known = ", ".join(ARCHITECTURES.values())
        told = ", ".join(map(shown, names[:3])) if isinstance(names, list) else shown(names)
        raise DataError(f"{file}: architecture {told}, where one of {known} is read; give the pretrained model")
    wrong = {
        "position_embedding_type": config.get("position_embedding_type", "absolute") != "absolute",
        "is_decoder": config.get("is_decoder", False),
        "pruned_heads": config.get("pruned_heads"),
        "quantization_config": config.get("quantization_config"),
        "hidden_act": config.get("hidden_act") not in ACTIVATIONS,
    }
    for name, found in wrong.items():
        if found:
            told = shown(config.get(name))
            raise DataError(f"{file}: {name} is {told}, which has no counterpart here; it cannot be read")
    if missing := sorted(set(SIZES) - set(config)):
        raise DataError(f"{file}: says nothing of {', '.join(missing)}; give a directory that save_pretrained wrote")
    values = {ours: config[theirs] for theirs, ours in SIZES.items()}
    tied = bool(config.get("tie_word_embeddings", True))
    try:
        return ModelConfig.of({**values, "norm": norm, "tied_head": tied, "scaled_init": False})
    except UsageError as error:
        raise DataError(f"{file}: {error}") from None


def read_directory(path: Path, vocabulary: Vocabulary | None = None) -> tuple[dict[str, Any], Weights, Vocabulary]:
    """Read a Hugging Face directory.

    Parameters
    ----------
    path : Path
    vocabulary : Vocabulary, optional
        Of its tokens; else the one in the directory (as Megacell writes it), or Geneformer's published one of its size.

    Returns
    -------
    cfg : dict
        As in a .nemo file.
    weights : iterator of (str, Tensor)
        Whole, float32, under our names; checked already.
    vocabulary : Vocabulary

    Raises
    ------
    DataError, UsageError
        Not a network that ours can be, damaged or refused files, or a vocabulary of another size.
    """
    network = read_sizes(path)
    vocabulary = _find_vocabulary(path, network, vocabulary)
    if vocabulary.size != network.vocabulary_size:
        raise DataError(
            f"{path}: the model has {network.vocabulary_size:,} tokens, vocabulary {vocabulary.name} "
            f"{vocabulary.size:,}: another dictionary; give the one it was trained with"
        )
    state = find_tensors(path)
    _check(path, state, network)
    name = plain_name(path.resolve().name)
    provenance = {"step": 0, "made": "imported", "from": name, "format": ARCHITECTURES[network.norm]}
    cfg = {"network": network.to_dict(), "precision": "fp32", "vocabulary": vocabulary.hash, "provenance": provenance}
    return cfg, to_ours(state, network), vocabulary


def _find_vocabulary(path: Path, network: ModelConfig, given: Vocabulary | None) -> Vocabulary:
    """Return the vocabulary in the directory, which has to be the one given if one is, else that, else a published."""
    own = Vocabulary.open(path / VOCABULARY) if (path / VOCABULARY).is_dir() else None
    if own is not None and given is not None and own.hash != given.hash:
        raise DataError(
            f"{path}: was trained with another vocabulary ({own.hash[:12]}…, not {given.hash[:12]}…); leave it out"
        )
    if (known := own or given) is not None:
        return known
    edition = PUBLISHED_SIZES.get(network.vocabulary_size)
    if edition is None:
        raise UsageError(f"{path}: has no vocabulary with it; give --vocabulary, the one it was trained with")
    from megacell.geneformer.vocabulary.published import fetch_geneformer

    return fetch_geneformer(edition)


def _check(path: Path, state: State, network: ModelConfig) -> None:
    """Refuse tensors that are not the network's; a tied model may hold its decoder too, if it is the embedding."""
    shapes = _shapes(network)
    if not network.tied_head and f"{DECODER}.bias" in state:
        shapes[f"{DECODER}.bias"] = shapes[BIAS]
    check_tensors(state, shapes, str(path), CONFIG, (*UNUSED, f"{DECODER}.weight", f"{DECODER}.bias"))
    if network.tied_head and f"{DECODER}.weight" in state and not torch.equal(state[f"{DECODER}.weight"], state[WORDS]):
        raise DataError(f"{path}: {CONFIG} says that embedding and decoder are one, but the two differ; it is refused")


def _shapes(network: ModelConfig) -> Shapes:
    """Return the shape of each of Hugging Face's tensors."""
    hidden, ffn, rows = network.hidden, network.ffn, network.vocabulary_size
    shapes: Shapes = {
        WORDS: (rows, hidden),
        POSITIONS: (network.max_length, hidden),
        TYPES: (2, hidden),
        BIAS: (rows,),
    }
    if not network.tied_head:
        shapes |= {f"{DECODER}.weight": (rows, hidden)}
    for ours, theirs in _pairs(network):
        if theirs.endswith("bias"):
            shapes[theirs] = (ffn if "fc1" in ours else hidden,)
        elif "norm" in ours:
            shapes[theirs] = (hidden,)
        else:
            shapes[theirs] = (ffn, hidden) if "fc1" in ours else (hidden, ffn) if "fc2" in ours else (hidden, hidden)
    for ours, names in _attentions(network):
        shapes |= dict.fromkeys(names, (hidden, hidden) if ours.endswith("weight") else (hidden,))
    return shapes


# -- out


def save(model: "GeneformerModel", out: Path, figures: dict[str, Any] | None = None) -> None:
    """Write a model as a directory that ``transformers`` loads: all of it, or nothing.

    ``vocabulary/`` in it is ours, and the dictionaries beside it are Geneformer's pickles.

    Parameters
    ----------
    model : GeneformerModel
    out : Path
    figures : dict, optional
        Of its training, for the model card.

    Raises
    ------
    UsageError
        ``out`` exists.
    DataError
        It cannot be written, or another process is writing it; or no class of ``transformers`` computes what the model
        does.
    """
    refuse_existing(out)
    if model.sizes.activation not in ACTIVATIONS:
        raise DataError(
            f"{out}: the model has GELU by tanh in its feed-forward layers and the exact one in its head, which no "
            "class of transformers has; export it --to nemo"
        )
    out.parent.mkdir(parents=True, exist_ok=True)
    with lock.held(lock.beside(out), f"{out}: another process is writing it"):
        refuse_existing(out)  # again: the other one may have ended between
        _write(model, out, figures or {})


def _write(model: "GeneformerModel", out: Path, figures: dict[str, Any]) -> None:
    """Write the directory beside its place, and give it its name."""
    from megacell.geneformer.vocabulary.geneformer_dictionaries import write_dictionaries

    network, work = model.sizes, out.with_name(f".{out.name}{TEMPORARY}")
    state = {name.removeprefix("bert."): tensor for name, tensor in model.weights().items()}
    try:
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
        config = {**_config(network), "pad_token_id": model.vocabulary.specials["pad"]}
        (work / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
        tensors = {name: tensor.contiguous() for name, tensor in to_theirs(state, network).items()}
        save_file(tensors, work / WEIGHTS, metadata={"format": "pt"})
        model.vocabulary.save(work / VOCABULARY)
        write_dictionaries(model.vocabulary, work)
        (work / "README.md").write_text(model_card(model, ARCHITECTURES[network.norm], figures))
        for file in work.rglob("*"):
            if file.is_file():
                flush_file(file)
        move_into_place(work, out)
    except (OSError, SafetensorError) as error:
        raise DataError(f"{out}: could not be written ({error}); see to room and rights") from error
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _config(network: ModelConfig) -> dict[str, Any]:
    values = network.to_dict()
    return {
        "architectures": [ARCHITECTURES[network.norm]],
        "model_type": MODEL_TYPES[network.norm],
        **{theirs: values[ours] for theirs, ours in SIZES.items()},
        "position_embedding_type": "absolute",
        "type_vocab_size": 2,
        "tie_word_embeddings": network.tied_head,
        "dtype": "float32",
    }
