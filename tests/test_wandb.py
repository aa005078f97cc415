# SPDX-License-Identifier: Apache-2.0
"""`logger=wandb`: what Weights & Biases keeps of a run without a network is what metrics.csv says."""

import os
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from omegaconf import OmegaConf
from runs import TINY, WAIT, metrics

from megacell.core.errors import UsageError
from megacell.training.run import loggers

BLOCK = (
    32 * 1024
)  # of the record format, LevelDB's log: checksum (4 bytes), length (2), whether it is the last part (1)
LAST = (1, 4)


def records(folder: Path) -> Iterator:
    """Yield the records of an offline run."""
    from wandb.proto import wandb_internal_pb2

    (path,) = folder.glob("offline-run-*/run-*.wandb")
    content, at, data = path.read_bytes(), 7, b""
    while at + 7 <= len(content):
        if BLOCK - at % BLOCK < 7:
            at += BLOCK - at % BLOCK
            continue
        length, part = struct.unpack_from("<HB", content, at + 4)
        data += content[at + 7 : at + 7 + length]
        at += 7 + length
        if part in LAST:
            record = wandb_internal_pb2.Record()
            record.ParseFromString(data)
            yield record
            data = b""


def train(run: Path, *settings: str) -> None:
    own = {**os.environ, "WANDB_MODE": "offline", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-m", "megacell", "pretrain", f"out={run}", *settings]
    done = subprocess.run(command, env=own, capture_output=True, text=True, timeout=WAIT)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.exhaustive
def test_what_is_kept_offline_is_what_metrics_say(store, vocabulary, tmp_path):
    run = tmp_path / "run"
    tiny = [word for word in TINY if not word.startswith("logger")]
    train(run, f"store={store}", f"vocabulary={vocabulary}", *tiny, "steps=3", "logger=wandb", "logger.wandb.tags=[a]")
    found = list(records(run / "logs" / "wandb"))
    (about,) = (record.run for record in found if record.WhichOneof("record_type") == "run")
    assert (about.project, about.display_name, list(about.tags)) == ("megacell", "run", ["a"])
    assert about.run_id == (run / "wandb-id").read_text()
    told = {key.key for record in found for key in record.config.update}
    assert {"steps", "model", "batch", "seed"} <= told
    rows = [
        {item.key or "/".join(item.nested_key): float(item.value_json) for item in record.history.item}
        for record in found
        if record.WhichOneof("record_type") == "history"
    ]
    losses = {int(row["trainer/global_step"]): row["loss"] for row in rows if "loss" in row}
    assert losses == {int(row["step"]): float(row["loss"]) for row in metrics(run)}
    assert [row["held_out_loss"] for row in rows if "held_out_loss" in row]
    assert list((run / "logs").glob("events.out.tfevents.*")), "TensorBoard's files are there too"


def options(**logger) -> OmegaConf:
    return OmegaConf.create({"out": "run", "logger": {"tensorboard": True, "wandb": None, **logger}})


def test_wandb_is_asked_for_before_anything_starts(monkeypatch, tmp_path):
    asked = options(wandb={"project": "megacell", "entity": None, "name": None, "tags": []})
    loggers.check(options())
    monkeypatch.setenv("WANDB_MODE", "offline")
    loggers.check(asked)
    monkeypatch.setattr(loggers.importlib.util, "find_spec", lambda name: None)
    loggers.check(options())
    with pytest.raises(UsageError, match="pip install wandb"):
        loggers.check(asked)


def test_online_without_a_log_in_is_refused(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("WANDB_MODE", "WANDB_API_KEY", "NETRC"):
        monkeypatch.delenv(name, raising=False)
    asked = options(wandb={"project": "megacell", "entity": None, "name": None, "tags": []})
    with pytest.raises(UsageError, match="WANDB_MODE=offline"):
        loggers.check(asked)
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    loggers.check(asked)


def test_a_run_that_goes_on_is_the_same_run_there(tmp_path):
    asked = options(wandb={"project": "p", "entity": None, "name": "mine", "tags": []})
    asked.out = str(tmp_path)
    first = loggers.options(asked, first=True)["wandb_logger_kwargs"]
    assert first == loggers.options(asked, first=True)["wandb_logger_kwargs"]
    assert first["name"] == "mine"
    assert loggers.options(asked, first=False)["wandb_logger_kwargs"]["id"] is None
    assert "create_wandb_logger" not in loggers.options(options(), first=True)
