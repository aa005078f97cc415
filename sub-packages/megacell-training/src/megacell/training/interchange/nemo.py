# SPDX-License-Identifier: Apache-2.0
"""The .nemo archive: model_config.yaml, model_weights.ckpt, vocabulary/. Written whole or not at all, opened safely."""

import os
import shutil
import tarfile
import tempfile
from pathlib import Path

import torch
from nemo.core.connectors.save_restore_connector import SaveRestoreConnector
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from megacell.core.errors import DataError, UsageError
from megacell.geneformer.interchange import nemo_1
from megacell.geneformer.model.config import ModelConfig
from megacell.geneformer.model.tensor_shapes import shapes_of
from megacell.geneformer.vocabulary.vocabulary import Vocabulary
from megacell.training.interchange.safe_archive import Archive, load_tensors, one_line, open_archive
from megacell.training.interchange.tensors import State, Weights, check_tensors

CONFIG, WEIGHTS, VOCABULARY = "model_config.yaml", "model_weights.ckpt", "vocabulary"  # the last is a folder


class NemoArchive(SaveRestoreConnector):
    """NeMo's connector with our vocabulary inside, an atomic save, and no open unpickler."""

    def save_to(self, model, save_path: str) -> None:
        """Write the archive beside ``save_path`` and rename it into place."""
        target = Path(save_path)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as folder:
            inside = Path(folder) / "inside"
            inside.mkdir()
            OmegaConf.save(model.cfg, inside / self.model_config_yaml, resolve=True)
            try:
                torch.save(model.weights(), inside / self.model_weights_ckpt)
            except RuntimeError as error:  # torch's word for a write that failed
                raise DataError(f"{target}: could not be written, a full disk it seems; make room") from error
            model.vocabulary.save(inside / VOCABULARY)
            archive = Path(folder) / "archive"
            with tarfile.open(archive, "w:") as tar:
                tar.add(inside, arcname=".")
            with open(archive, "rb+") as file:
                os.fsync(file.fileno())
            os.replace(archive, target)

    @staticmethod
    def _unpack_nemo_file(path2file: str, out_folder: str, members=None) -> str:
        check_archive(Path(path2file))
        return SaveRestoreConnector._unpack_nemo_file(path2file, out_folder, members)

    @staticmethod
    def _load_state_dict_from_disk(model_weights, map_location="cpu"):
        with open(model_weights, "rb") as file:
            return load_tensors(file, str(model_weights))


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
        cfg = _config(archive, path)
        if nemo_1.is_nemo_1(cfg):
            return nemo_1.read(archive, cfg, path, given)
        _check_parts(archive, path)
        with tempfile.TemporaryDirectory() as folder:
            archive.unpack(VOCABULARY, Path(folder) / VOCABULARY)
            try:
                vocabulary = Vocabulary.open(Path(folder) / VOCABULARY)
            except DataError as error:
                raise DataError(f"{path}: {str(error).removeprefix(folder + os.sep)}") from None
        weights = {name.removeprefix("bert."): tensor for name, tensor in archive.tensors(WEIGHTS).items()}
        _check_weights(weights, cfg, vocabulary, path)
        return cfg, iter(weights.items()), vocabulary


def read_config(path: Path) -> dict:
    """Return the configuration of an archive of ours, and unpack nothing else; DataError as `check_archive`."""
    with open_archive(path) as archive:
        cfg = _config(archive, path)
        _check_parts(archive, path)
        return cfg


def check_archive(path: Path) -> None:
    """Raise DataError unless ``path`` is a tar that is safe to open, with our parts in it."""
    read_config(path)


def _config(archive: Archive, path: Path) -> dict:
    if CONFIG not in archive.names:
        raise DataError(f"{path}: a .nemo file without {CONFIG}; give one of a Geneformer")
    try:
        cfg = OmegaConf.to_container(OmegaConf.create(archive.read(CONFIG).decode()))
    except (ValueError, YAMLError, OmegaConfBaseException, RecursionError) as error:
        raise DataError(f"{path}: its {CONFIG} cannot be read ({one_line(error)}); fetch it again") from None
    if not isinstance(cfg, dict):
        raise DataError(f"{path}: its {CONFIG} holds no options; fetch it again")
    return cfg


def _check_parts(archive: Archive, path: Path) -> None:
    folders = {os.path.dirname(name) for name in archive.names}
    if missing := sorted({WEIGHTS, VOCABULARY} - archive.names - folders):
        raise DataError(f"{path}: a .nemo file without {', '.join(missing)}: not one that Megacell wrote")


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


def save(model, out: Path) -> None:
    """Write ``model`` as ``out``; refuses to overwrite."""
    if out.exists():
        raise DataError(f"{out} exists: choose another --out")
    out.parent.mkdir(parents=True, exist_ok=True)
    if (free := shutil.disk_usage(out.parent).free) < (need := sum(w.nbytes for w in model.weights().values())):
        raise DataError(f"{out.parent}: {free:,} bytes free, {need:,} needed")
    model.save_to(str(out))
