# SPDX-License-Identifier: Apache-2.0
"""The one way to open a trained model: a .nemo file, a Hugging Face directory, a run, or one of its checkpoints."""

from pathlib import Path

from omegaconf import OmegaConf

from megacell.core.errors import DataError
from megacell.geneformer.interchange.hugging_face import VOCABULARY, read_directory, read_sizes
from megacell.geneformer.interchange.nemo import read_archive
from megacell.geneformer.model.archive import read_own_config
from megacell.geneformer.model.bert import PackedBert
from megacell.geneformer.model.config import ModelConfig
from megacell.geneformer.model.geneformer_model import GeneformerModel
from megacell.geneformer.model.provenance import TOLD, check_facts
from megacell.geneformer.model.tensor_shapes import check_stored
from megacell.geneformer.vocabulary.vocabulary import Vocabulary
from megacell.training.checkpoint import checkpoint
from megacell.training.checkpoint.find import find_checkpoint
from megacell.training.distributed import device
from megacell.training.interchange.tensors import Weights
from megacell.training.nn.weights import copy_whole


def is_hugging_face(path: Path) -> bool:
    """Return whether a path is a folder of a Hugging Face model."""
    return (path / "config.json").is_file()


def open_model(path: Path, vocabulary: Vocabulary | None = None) -> GeneformerModel:
    """Return the ``GeneformerModel`` of a model, in evaluation mode, in this one process.

    Its ``vocabulary`` is set, and ``cfg.provenance`` says what it was trained on.

    Parameters
    ----------
    path : Path
        .nemo file, Hugging Face directory, run or checkpoint.
    vocabulary : Vocabulary, optional
        Of a Hugging Face directory that comes without one; of any other it has to be the model's own.

    Raises
    ------
    UsageError, DataError
        If there is no such model there, or it is damaged.
    """
    if is_hugging_face(path):
        return _built(*read_directory(path, vocabulary))
    model = _built(*read_archive(path, vocabulary)) if path.is_file() else _of_checkpoint(find_checkpoint(path))
    if vocabulary is not None:
        _check_vocabulary(path, model.vocabulary.hash, vocabulary)
    return model


def _built(cfg: dict, weights: Weights, vocabulary: Vocabulary) -> GeneformerModel:
    """Return the network that a configuration describes, filled with whole weights, in evaluation mode."""
    return GeneformerModel.filled(cfg, weights, vocabulary).to(device.device()).eval()


def _of_checkpoint(folder: Path) -> GeneformerModel:
    facts = checkpoint.read_facts(folder)
    network = check_facts(facts, str(folder))
    vocabulary = Vocabulary.open(folder.parent.parent / "vocabulary")
    _check_vocabulary(folder, facts["vocabulary"], vocabulary)
    if vocabulary.size != network.vocabulary_size:
        told = f"{network.vocabulary_size:,} tokens, its vocabulary {vocabulary.size:,}"
        raise DataError(f"{folder}: says that its network has {told}; take another checkpoint")
    check_stored(network, folder)
    provenance = {name: facts[name] for name in TOLD}
    cfg = {"network": facts["network"], "precision": facts["precision"], "vocabulary": vocabulary.hash,
           "provenance": provenance}  # fmt: skip
    model = GeneformerModel(OmegaConf.create(cfg))
    with device.single_process():
        checkpoint.load(folder, model.bert)
    model.vocabulary = vocabulary
    return model.to(device.device()).eval()


def check_fit(network: ModelConfig, vocabulary: Vocabulary, path: Path) -> None:
    """Look, without reading any weight, whether a network can be filled with the weights of a model.

    Raises
    ------
    UsageError, DataError
        If there is no such model, or it is of other sizes or another vocabulary.
    """
    theirs, written = _facts(path, vocabulary)
    _check_vocabulary(path, written, vocabulary)
    if differ := network.differing(theirs):
        raise DataError(f"{path}: its {', '.join(differ)} differ from the model to be filled: give the same model=")


def _facts(path: Path, vocabulary: Vocabulary) -> tuple[ModelConfig, str]:
    """Return what a model says of its network and vocabulary; a bare Hugging Face one has only sizes."""
    if path.is_file():
        cfg = read_own_config(path)
        return ModelConfig.of(cfg["network"]), cfg["vocabulary"]
    if not is_hugging_face(path):
        folder = find_checkpoint(path)
        facts = checkpoint.read_facts(folder)
        return check_facts(facts, str(folder)), facts["vocabulary"]
    sizes, own = read_sizes(path), path / VOCABULARY
    return sizes, (Vocabulary.open(own) if own.is_dir() else vocabulary).hash


def load_into(bert: PackedBert, network: ModelConfig, vocabulary: Vocabulary, path: Path) -> None:
    """Fill a network that stands on this rank with the weights of a model, at any tensor parallel size.

    Raises
    ------
    UsageError, DataError
        As ``check_fit``.
    """
    check_fit(network, vocabulary, path)
    if is_hugging_face(path):
        copy_whole(bert, read_directory(path, vocabulary)[1])
        return
    if path.is_file():
        copy_whole(bert, read_archive(path, vocabulary)[1])
        return
    checkpoint.load(find_checkpoint(path), bert)


def _check_vocabulary(path: Path, expected: str, vocabulary: Vocabulary) -> None:
    if vocabulary.hash != expected:
        raise DataError(f"{path}: was trained with another vocabulary ({expected[:12]}…, not {vocabulary.hash[:12]}…)")
