# SPDX-License-Identifier: Apache-2.0
"""A Geneformer's .nemo file: what lies in it, and its reading, with all checks before a network is built."""

import os
import tempfile
from pathlib import Path
from typing import Any

from megacell.core.errors import DataError, UsageError
from megacell.geneformer.model.config import ModelConfig
from megacell.geneformer.model.provenance import check_provenance
from megacell.geneformer.model.tensor_shapes import shapes_of
from megacell.geneformer.vocabulary.vocabulary import Vocabulary
from megacell.training.interchange.nemo import CONFIG, WEIGHTS, NemoArchive, check_own, read_config
from megacell.training.interchange.safe_archive import Archive, one_line
from megacell.training.interchange.tensors import State, check_tensors
from megacell.training.nn.layout import Layout

VOCABULARY = "vocabulary"  # folder of an archive


class GeneformerArchive(NemoArchive):
    """A .nemo file with the vocabulary inside."""

    parts = (WEIGHTS, VOCABULARY)

    def save_parts(self, model: Any, folder: Path) -> None:
        """Write the vocabulary."""
        model.vocabulary.save(folder / VOCABULARY)


def read_own(archive: Archive, cfg: dict[str, Any], path: Path) -> tuple[dict[str, Any], State, Vocabulary]:
    """Read an open archive that Megacell wrote.

    Parameters
    ----------
    archive : Archive
    cfg : dict
        Its configuration.
    path : Path
        For messages.

    Returns
    -------
    cfg : dict
        ``network``, ``precision``, ``vocabulary`` and ``provenance``, and nothing else.
    weights : mapping of Tensor
        Whole (uncut), on the CPU, by our names; those of the network, and finite.
    vocabulary : Vocabulary

    Raises
    ------
    DataError
        Damaged, not safe to open, or with parts that do not fit each other.
    """
    check_own(archive, cfg, path, GeneformerArchive.parts)
    network = _network(cfg, path)
    provenance = cfg.get("provenance") or {}
    check_provenance(provenance, f"{path}: {CONFIG}")
    taken = {name: cfg[name] for name in ("network", "precision", "vocabulary")}
    with tempfile.TemporaryDirectory() as folder:
        archive.unpack(VOCABULARY, Path(folder) / VOCABULARY)
        try:
            vocabulary = Vocabulary.open(Path(folder) / VOCABULARY)
        except DataError as error:
            raise DataError(f"{path}: {str(error).removeprefix(folder + os.sep)}") from None
    if (written := cfg["vocabulary"]) != vocabulary.hash or vocabulary.size != network.vocabulary_size:
        raise DataError(f"{path}: was trained with another vocabulary ({written[:12]}…) than it holds; refused")
    weights = {name.removeprefix("bert."): tensor for name, tensor in archive.tensors(WEIGHTS).items()}
    check_tensors(weights, shapes_of(network, network.padded_vocabulary), str(path), CONFIG)
    return {**taken, "provenance": {"step": 0, **provenance}}, weights, vocabulary


def read_own_config(path: Path) -> dict[str, Any]:
    """Return the configuration of a .nemo file of ours, which describes a network; nothing else of it is read."""
    cfg = read_config(path, GeneformerArchive.parts)
    _network(cfg, path)
    return cfg


def _network(cfg: dict[str, Any], path: Path) -> ModelConfig:
    """Return the network that a configuration describes; DataError if it describes none."""
    try:
        Layout(precision=cfg["precision"])
        if not isinstance(cfg["vocabulary"], str):
            raise TypeError("vocabulary is no hash")
        return ModelConfig.of(cfg["network"])
    except (UsageError, KeyError, TypeError) as error:
        raise DataError(f"{path}: its {CONFIG} describes no network ({one_line(error)}); fetch it again") from None
