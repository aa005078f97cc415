# SPDX-License-Identifier: Apache-2.0
"""Geneformers in .nemo files: those of Megacell, and those of NeMo 1 and BioNeMo 1."""

import os
import tempfile
from pathlib import Path

from megacell.core.errors import DataError, UsageError
from megacell.geneformer.interchange import nemo_1
from megacell.geneformer.model.config import ModelConfig
from megacell.geneformer.model.geneformer_model import VOCABULARY, GeneformerArchive
from megacell.geneformer.model.tensor_shapes import shapes_of
from megacell.geneformer.vocabulary.vocabulary import Vocabulary
from megacell.training.interchange.nemo import CONFIG, WEIGHTS, check_parts, config_of
from megacell.training.interchange.safe_archive import one_line, open_archive
from megacell.training.interchange.tensors import State, Weights, check_tensors


def read_archive(path: Path, given: Vocabulary | None = None) -> tuple[dict, Weights, Vocabulary]:
    """Return an archive's configuration, its whole (uncut) weights on the CPU, checked, and its vocabulary.

    Parameters
    ----------
    path : Path
        A .nemo file of ours, or of a Megatron BERT of NeMo 1 or BioNeMo 1.
    given : Vocabulary, optional
        For one that holds none.

    Raises
    ------
    DataError, UsageError
        If it is neither, damaged, or not safe to open; or without a vocabulary.
    """
    with open_archive(path) as archive:
        cfg = config_of(archive, path)
        if nemo_1.is_nemo_1(cfg):
            return nemo_1.read(archive, cfg, path, given)
        check_parts(archive, path, GeneformerArchive.parts)
        with tempfile.TemporaryDirectory() as folder:
            archive.unpack(VOCABULARY, Path(folder) / VOCABULARY)
            try:
                vocabulary = Vocabulary.open(Path(folder) / VOCABULARY)
            except DataError as error:
                raise DataError(f"{path}: {str(error).removeprefix(folder + os.sep)}") from None
        weights = {name.removeprefix("bert."): tensor for name, tensor in archive.tensors(WEIGHTS).items()}
        _check_weights(weights, cfg, vocabulary, path)
        return cfg, iter(weights.items()), vocabulary


def _check_weights(weights: State, cfg: dict, vocabulary: Vocabulary, path: Path) -> None:
    """Refuse weights that are not those that the configuration tells of, or another vocabulary."""
    try:
        network = ModelConfig.of(cfg["network"])
        written = cfg["vocabulary"]
    except (UsageError, KeyError, TypeError) as error:
        raise DataError(f"{path}: its {CONFIG} describes no network ({one_line(error)}); fetch it again") from None
    if written != vocabulary.hash or vocabulary.size != network.vocabulary_size:
        raise DataError(f"{path}: was trained with another vocabulary ({str(written)[:12]}…) than it holds; refused")
    check_tensors(weights, shapes_of(network, network.padded_vocabulary), str(path), CONFIG)
