# SPDX-License-Identifier: Apache-2.0
"""The .nemo archive: model_config.yaml, model_weights.ckpt, a family's own parts. Whole or not there, opened safely."""

import os
import shutil
import tarfile
import tempfile
from pathlib import Path
from typing import Any

import torch
from nemo.core.connectors.save_restore_connector import SaveRestoreConnector
from omegaconf import OmegaConf

from megacell.core.errors import DataError
from megacell.training.foreign.plain import MOST_BYTES, parse_yaml, refuse_references
from megacell.training.interchange.safe_archive import Archive, load_tensors, one_line, open_archive
from megacell.training.interchange.tensors import State

CONFIG, WEIGHTS = "model_config.yaml", "model_weights.ckpt"


class NemoArchive(SaveRestoreConnector):
    """NeMo's connector with an atomic save and no open unpickler; a family's subclass adds what else lies inside.

    Attributes
    ----------
    parts : tuple of str
        Files and folders that an archive has to hold beside its configuration.
    """

    parts: tuple[str, ...] = (WEIGHTS,)

    def save_parts(self, model: Any, folder: Path) -> None:
        """Write what the family keeps beside the weights."""

    @classmethod
    def check(cls, path: Path) -> None:
        """Raise DataError unless ``path`` is a tar that is safe to open, with all parts in it."""
        read_config(path, cls.parts)

    def save_to(self, model: Any, save_path: str) -> None:
        """Write the archive beside ``save_path`` and rename it into place."""
        target = Path(save_path)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as folder:
            inside = Path(folder) / "inside"
            inside.mkdir()
            _write_config(model.cfg, inside / self.model_config_yaml)
            try:
                torch.save(model.weights(), inside / self.model_weights_ckpt)
            except RuntimeError as error:  # torch's word for a write that failed
                raise DataError(f"{target}: could not be written, a full disk it seems; make room") from error
            self.save_parts(model, inside)
            archive = Path(folder) / "archive"
            with tarfile.open(archive, "w:") as tar:
                tar.add(inside, arcname=".")
            with open(archive, "rb+") as file:
                os.fsync(file.fileno())
            os.replace(archive, target)

    @classmethod
    def _unpack_nemo_file(cls, path2file: str, out_folder: str, members: list[str] | None = None) -> str:
        cls.check(Path(path2file))
        folder: str = SaveRestoreConnector._unpack_nemo_file(path2file, out_folder, members)
        return folder

    @staticmethod
    def _load_state_dict_from_disk(model_weights: str | Path, map_location: Any = "cpu") -> State:
        with open(model_weights, "rb") as file:
            return load_tensors(file, str(model_weights))


def read_config(path: Path, parts: tuple[str, ...] = (WEIGHTS,)) -> dict[str, Any]:
    """Return the configuration of an archive of ours, and unpack nothing else.

    Raises
    ------
    DataError
        If it is no tar that is safe to open, lacks one of its parts, or has ``${…}`` in its configuration.
    """
    with open_archive(path) as archive:
        cfg = config_of(archive, path)
        check_own(archive, cfg, path, parts)
        return cfg


def config_of(archive: Archive, path: Path) -> dict[str, Any]:
    """Return the configuration of an open archive, in which texts with ``${…}`` stand as they are.

    Those of ours have none, which `check_own` looks to; NeMo 1's may have some.

    Raises
    ------
    DataError
        It has none that can be read.
    """
    if CONFIG not in archive.names:
        raise DataError(f"{path}: a .nemo file without {CONFIG}; give a whole one")
    try:
        return parse_yaml(archive.read(CONFIG, MOST_BYTES), references=True)
    except ValueError as error:
        raise DataError(f"{path}: its {CONFIG} cannot be read ({one_line(error)}); fetch it again") from None


def _write_config(cfg: Any, path: Path) -> None:
    """Write a model's configuration; what stands in ``${…}`` is not resolved, it could be of the environment."""
    try:
        refuse_references(OmegaConf.to_container(cfg, resolve=False))
    except ValueError as error:
        raise DataError(f"the model's configuration cannot be written: {error}; give the value itself") from None
    OmegaConf.save(cfg, path)


def check_own(archive: Archive, cfg: dict[str, Any], path: Path, parts: tuple[str, ...]) -> None:
    """Raise DataError where an open archive lacks files or folders, or its configuration holds ``${…}``."""
    try:
        refuse_references(cfg)
    except ValueError as error:
        raise DataError(f"{path}: its {CONFIG} is refused: {error}") from None
    folders = {os.path.dirname(name) for name in archive.names}
    if missing := sorted(set(parts) - archive.names - folders):
        raise DataError(f"{path}: a .nemo file without {', '.join(missing)}: not one that Megacell wrote")


def save(model: Any, out: Path) -> None:
    """Write ``model`` as ``out``; refuses to overwrite."""
    if out.exists():
        raise DataError(f"{out} exists: choose another --out")
    out.parent.mkdir(parents=True, exist_ok=True)
    if (free := shutil.disk_usage(out.parent).free) < (need := sum(w.nbytes for w in model.weights().values())):
        raise DataError(f"{out.parent}: {free:,} bytes free, {need:,} needed")
    model.save_to(str(out))
