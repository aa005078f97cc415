# SPDX-License-Identifier: Apache-2.0
"""Geneformers in .nemo files: those of Megacell, and those of NeMo 1 and BioNeMo 1."""

from pathlib import Path

from megacell.geneformer.interchange import nemo_1
from megacell.geneformer.model.archive import read_own
from megacell.geneformer.vocabulary.vocabulary import Vocabulary
from megacell.training.interchange.nemo import config_of
from megacell.training.interchange.safe_archive import open_archive
from megacell.training.interchange.tensors import Weights


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
        cfg, weights, vocabulary = read_own(archive, cfg, path)
        return cfg, iter(weights.items()), vocabulary
