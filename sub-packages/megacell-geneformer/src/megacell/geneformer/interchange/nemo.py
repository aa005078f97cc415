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

from megacell.geneformer.vocabulary import Vocabulary
from megacell.store.errors import DataError

VOCABULARY = "vocabulary"  # folder inside the archive


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
    def _safe_extract(tar, out_folder: str, members=None):
        for member in tar.getmembers() if members is None else members:
            if not (member.isfile() or member.isdir()):
                raise DataError(f"{tar.name}: holds {member.name}, which is neither file nor folder: refused")
        SaveRestoreConnector._safe_extract(tar, out_folder, members)

    @staticmethod
    def _load_state_dict_from_disk(model_weights, map_location="cpu"):
        return torch.load(model_weights, map_location=map_location, weights_only=True)


def read_archive(path: Path) -> tuple[dict, dict[str, torch.Tensor], Vocabulary]:
    """Return an archive's configuration, its whole (uncut) weights on the CPU, and its vocabulary.

    Raises
    ------
    DataError
        If it is not a .nemo of ours, or damaged.
    """
    try:
        with tempfile.TemporaryDirectory() as folder:
            NemoArchive._unpack_nemo_file(str(path), folder)
            cfg = OmegaConf.to_container(OmegaConf.load(Path(folder) / "model_config.yaml"))
            weights = NemoArchive._load_state_dict_from_disk(Path(folder) / "model_weights.ckpt")
            vocabulary = Vocabulary.open(Path(folder) / VOCABULARY)
            assert isinstance(cfg, dict)
            return cfg, weights, vocabulary
    except (OSError, tarfile.TarError, RuntimeError, ValueError) as error:
        raise DataError(f"{path}: not a .nemo file that Megacell wrote, or a damaged one: {error}") from error


def read_config(path: Path) -> dict:
    """Return an archive's configuration and unpack nothing else; DataError as ``check_archive``."""
    check_archive(path)
    with NemoArchive._tar_open(str(path)) as tar:
        (member,) = [m for m in tar.getmembers() if os.path.normpath(m.name) == "model_config.yaml"]
        file = tar.extractfile(member)
        if file is None:
            raise DataError(f"{path}: holds {member.name}, which is no file: refused")
        cfg = OmegaConf.to_container(OmegaConf.create(file.read().decode()))
    assert isinstance(cfg, dict)
    return cfg


def check_archive(path: Path) -> None:
    """Raise DataError unless ``path`` is a tar with our parts in it."""
    try:
        with NemoArchive._tar_open(str(path)) as tar:
            names = {os.path.normpath(name) for name in tar.getnames()}
    except (OSError, tarfile.TarError, EOFError) as error:
        raise DataError(f"{path}: not a .nemo file, or a damaged one: {error}") from error
    if missing := {"model_config.yaml", "model_weights.ckpt", VOCABULARY} - names:
        raise DataError(f"{path}: a .nemo file without {', '.join(sorted(missing))}: not one that Megacell wrote")


def save(model, out: Path) -> None:
    """Write ``model`` as ``out``; refuses to overwrite."""
    if out.exists():
        raise DataError(f"{out} exists: choose another --out")
    out.parent.mkdir(parents=True, exist_ok=True)
    if (free := shutil.disk_usage(out.parent).free) < (need := sum(w.nbytes for w in model.weights().values())):
        raise DataError(f"{out.parent}: {free:,} bytes free, {need:,} needed")
    model.save_to(str(out))
