# SPDX-License-Identifier: Apache-2.0
"""The one way to open a trained model: a .nemo file, a run folder, or one of its checkpoints."""

import logging
from pathlib import Path

from omegaconf import OmegaConf

from megacell.geneformer.model.config import ModelConfig
from megacell.geneformer.vocabulary import Vocabulary
from megacell.store.errors import DataError, UsageError

log = logging.getLogger(__name__)


def find_checkpoint(path: Path) -> Path:
    """Return the checkpoint that ``path`` is, or the newest whole one of the run that it is."""
    from megacell.geneformer.training import checkpoint

    if (path / checkpoint.MARKER).is_file():
        checkpoint.check(path)
        return path
    if (path / "checkpoints").is_dir():
        newest, lines = checkpoint.newest(path / "checkpoints")
        if newest is None:
            raise DataError(f"{path}: no whole checkpoint in it {'; '.join(lines)}".rstrip())
        for line in lines:
            log.warning(line)
        return newest
    raise UsageError(f"{path}: neither a .nemo file, a run folder nor a checkpoint")


def open_model(path: Path):
    """Return the ``GeneformerModel`` of a .nemo file, run or checkpoint, in evaluation mode, in this one process.

    Its ``vocabulary`` is set, and ``cfg.provenance`` says what it was trained on.

    Raises
    ------
    UsageError, DataError
        If there is no such model there, or it is damaged.
    """
    from megacell.geneformer.training import checkpoint, device
    from megacell.geneformer.training.module import GeneformerModel

    if not path.exists():
        raise UsageError(f"{path}: no such file or folder")
    if path.is_file():
        return GeneformerModel.restore_from(str(path)).eval()
    folder = find_checkpoint(path)
    facts = checkpoint.read_facts(folder)
    vocabulary = Vocabulary.open(folder.parent.parent / "vocabulary")
    _check_vocabulary(folder, facts["vocabulary"], vocabulary)
    provenance = {k: facts[k] for k in ("step", "store", "data", "versions")}
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
    from megacell.geneformer.interchange.nemo import read_config
    from megacell.geneformer.training import checkpoint

    theirs = read_config(path) if path.is_file() else checkpoint.read_facts(find_checkpoint(path))
    _check_vocabulary(path, theirs["vocabulary"], vocabulary)
    free = ("hidden_dropout", "attention_dropout", "init_std")  # may change when training goes on
    differ = [k for k, v in network.to_dict().items() if k not in free and theirs["network"].get(k) != v]
    if differ:
        raise DataError(f"{path}: its {', '.join(differ)} differ from the model to be filled: give the same model=")


def load_into(bert, network: ModelConfig, vocabulary: Vocabulary, path: Path) -> None:
    """Fill a network that stands on this rank with the weights of a model, at any tensor parallel size.

    Raises
    ------
    UsageError, DataError
        As ``check_fit``.
    """
    from megacell.geneformer.interchange.nemo import read_archive
    from megacell.geneformer.model.init import copy_whole
    from megacell.geneformer.training import checkpoint

    check_fit(network, vocabulary, path)
    if path.is_file():
        _, weights, _ = read_archive(path)
        copy_whole(bert, {name.removeprefix("bert."): tensor for name, tensor in weights.items()})
        return
    checkpoint.load(find_checkpoint(path), bert)


def _check_vocabulary(path: Path, expected: str, vocabulary: Vocabulary) -> None:
    if vocabulary.hash != expected:
        raise DataError(f"{path}: was trained with another vocabulary ({expected[:12]}…, not {vocabulary.hash[:12]}…)")
