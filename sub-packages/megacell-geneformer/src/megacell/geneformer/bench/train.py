# SPDX-License-Identifier: Apache-2.0
"""`megacell bench train`: real tokens a second of a real run, beside the stock path and Hugging Face in the same run.

Protocol: every contender trains in a process of its own, loader and optimizer inside. After a warm-up come windows,
each of so many steps or seconds; a figure is the median of its windows. Only real tokens count, no padding. Ours is
`megacell pretrain` itself, read off its metrics.csv and ended by a signal.
"""

import csv
import json
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from omegaconf import DictConfig, OmegaConf

from megacell.core.errors import DataError
from megacell.core.machine import where_and_when
from megacell.training.config import settings
from megacell.training.config.overrides import key_of

ENDLESS = 1_000_000  # steps; a signal ends the run
EVENNESS_STEPS = 20  # steps whose packs tell how many of the computed tokens are real
MEGACELL = (sys.executable, "-m", "megacell")
PEAKS = {  # dense 16-bit TFLOP/s as the vendor states them, by a part of the GPU's name
    "A100": 312.0,
    "H100": 989.0,
    "H200": 989.0,
}


@dataclass(frozen=True)
class Protocol:
    """How long is measured: a window ends with its steps or its seconds, whichever is first."""

    warmup: int
    steps: int
    seconds: float
    windows: int


def bench_train(
    overrides: list[str],
    references: list[str],
    batches: list[int],
    precisions: list[str],
    protocol: Protocol,
    log: Any = print,
) -> dict[str, Any]:
    """Measure `megacell pretrain`, and references on the same cells, with each size of batch in each precision.

    Parameters
    ----------
    overrides : list of str
        As for `megacell pretrain`, without ``out``. With ``batch.cells`` given, ours is measured with that alone.
    references : list of str
        Of ``hugging_face``, ``hugging_face_grouped`` and ``stock_megatron``.
    batches : list of int
        Cells of a step.
    precisions : list of str
        Of ``fp32``, ``bf16`` and ``fp16``; none: that of the settings.
    protocol : Protocol

    Returns
    -------
    dict
        In JSON's types. ``failed`` holds the contenders that ended by themselves, and what they said.

    Raises
    ------
    DataError
        All contenders failed.
    """
    given = any(key_of(override) == "batch.cells" for override in overrides)
    contenders: dict[str, dict[str, Any]] = {}
    failed: dict[str, str] = {}
    with tempfile.TemporaryDirectory(prefix="megacell-bench-") as folder:
        cfg = settings.compose([*overrides, f"out={folder}/run"])
        lengths, vocabulary = token_counts(cfg)
        flops = flops_a_token(cfg, lengths, vocabulary)

        def measure(name: str, cells: int, precision: str, run: Callable[[], dict[str, Any]]) -> None:
            key = f"{name}, {cells} cells, {precision}"
            try:
                figures = run()
            except DataError as error:  # the others are worth their time yet
                failed[key] = str(error)
                log(f"{key}: not measured; {error}")
                return
            described = {"name": name, "cells": cells, "precision": precision}
            contenders[key] = {**described, **figures, **_of_each_rank(figures, flops)}
            log(line(key, contenders[key]))

        for precision in precisions or [cfg.precision]:
            for cells in [cfg.batch.cells] if given else batches:
                own = [*overrides, f"precision={precision}", f"batch.cells={cells}"]
                out = Path(folder) / f"{precision}-{cells}"
                measure("megacell", cells, precision, partial(_ours, own, out, protocol))
            for name in references:
                for cells in batches:
                    run = partial(_reference, name, cfg, cells, precision, protocol)
                    measure(name, cells, precision, run)
    if not contenders:
        raise DataError("nothing could be measured; see above")
    return {
        **where_and_when(),
        "accelerator": accelerator(),
        "settings": {
            "overrides": [o for o in overrides if o.split("=")[0] not in ("store", "vocabulary")],
            "model": OmegaConf.to_container(cfg.model),
            "devices": cfg.devices,
        },
        "protocol": asdict(protocol),
        "tokens_a_cell": {str(q): int(np.quantile(lengths, q)) for q in (0.0, 0.25, 0.5, 0.75, 1.0)},
        "required_flops_a_token": flops,
        "flops_convention": "3 x forward; attention over each cell; the head at masked positions only",
        "peak_flops": peak_flops(),
        "contenders": contenders,
        "failed": failed,
        "times": {key: times(contenders, each) for key, each in contenders.items() if each["name"] != "megacell"},
    }


def times(contenders: dict[str, dict[str, Any]], reference: dict[str, Any]) -> dict[str, float]:
    """Return how many times as many real tokens a second a process of ours trains on, by our precision.

    Compared is ours with as many cells a step; where that was not measured, its fastest; nothing, if there is none.
    """
    rates: dict[str, dict[int, float]] = {}
    for each in contenders.values():
        if each["name"] == "megacell":
            rates.setdefault(each["precision"], {})[each["cells"]] = each["tokens_per_second_a_rank"]
    return {
        precision: own.get(reference["cells"], max(own.values())) / reference["tokens_per_second_a_rank"]
        for precision, own in rates.items()
    }


def token_counts(cfg: DictConfig) -> tuple[np.ndarray, int]:
    """Return the tokens of each training cell, as cut to the model's length, and the vocabulary's size."""
    from megacell.geneformer.pretraining.data import TrainingData

    data = TrainingData.open(cfg)
    around = len(data.vocabulary.prefix) + len(data.vocabulary.suffix)
    return np.minimum(data.lengths[data.train[:]].astype(np.int64) + around, cfg.model.max_length), data.vocabulary.size


def evenness(cfg: DictConfig, ranks: int) -> tuple[float, float]:
    """Return the imbalance of data parallel ranks and the fill, as `BatchStream.evenness`, means over a few steps."""
    from megacell.geneformer.pretraining.data import TrainingData

    stream = TrainingData.open(cfg).stream(ranks=ranks, tensor=cfg.parallel.tensor)
    imbalance, fill = np.mean([stream.evenness(k) for k in range(EVENNESS_STEPS)], axis=0)
    return float(imbalance), float(fill)


def _ours(overrides: list[str], out: Path, protocol: Protocol) -> dict[str, Any]:
    """Measure `megacell pretrain`; its metrics.csv does not tell how full its packs are, their lengths do."""
    cfg = settings.compose([*overrides, f"out={out}"])
    figures = measure_pretrain(overrides, out, protocol)
    _, fill = evenness(cfg, cfg.devices // cfg.parallel.tensor)
    padded = figures["tokens_per_second"] / fill
    return {**figures, "padded_tokens_per_second": padded, "real_of_computed": fill, "ranks": cfg.devices}


def measure_pretrain(
    overrides: list[str], out: Path, protocol: Protocol, start: Sequence[str] = MEGACELL
) -> dict[str, Any]:
    """Run `megacell pretrain` until enough windows are in its metrics.csv, and return its figures.

    Parameters
    ----------
    overrides : list of str
        As for `megacell pretrain`, without ``out``.
    out : Path
        The run folder.
    protocol : Protocol
    start : sequence of str
        How `megacell` is started.

    Raises
    ------
    DataError
        The run ended by itself; with what it said.
    """
    settings_of_bench = (
        f"out={out}", f"steps={ENDLESS}", f"validation.every={ENDLESS}", f"checkpoint.every={ENDLESS}", "log_every=1",
        "validation.cells=64", "data.baseline_cells=1000", "optim.warmup=1000",
    )  # fmt: skip
    command = [*start, "pretrain", *overrides, *settings_of_bench]
    with tempfile.TemporaryFile("w+") as said:
        process = subprocess.Popen(command, stdout=said, stderr=subprocess.STDOUT)
        try:
            windows = _watch(out / "metrics.csv", process, protocol)
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(600)
            except subprocess.TimeoutExpired:
                process.kill()
        if windows is None:
            said.seek(0)
            raise DataError(f"megacell pretrain: {_ended(process.returncode, said.read())}")
    return _figures(windows)


def _watch(path: Path, process: subprocess.Popen, protocol: Protocol) -> list[dict[str, float]] | None:
    """Return the windows once they are all there; None if the run ends before."""
    while process.poll() is None:
        time.sleep(0.5)
        if path.is_file() and len(windows := _cut(path, protocol)) >= protocol.windows:
            return windows
    return None


def _cut(path: Path, protocol: Protocol) -> list[dict[str, float]]:
    """Return the whole windows that metrics.csv holds past the warm-up."""
    with open(path, newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["tokens_per_second"] and row["memory_gib"]]
    windows, sums = [], dict.fromkeys(("seconds", "tokens", "cells", "steps", "data_seconds", "engine_seconds"), 0.0)
    for row in rows[protocol.warmup :]:
        seconds = float(row["tokens"]) / float(row["tokens_per_second"])
        for name, value in (
            ("seconds", seconds), ("tokens", float(row["tokens"])), ("cells", float(row["cells"])), ("steps", 1.0),
            ("data_seconds", seconds * float(row["data_wait"])), ("engine_seconds", seconds * float(row["engine"])),
        ):  # fmt: skip
            sums[name] += value
        if sums["seconds"] >= protocol.seconds or sums["steps"] >= protocol.steps:
            windows.append({**sums, "memory_gib": float(row["memory_gib"])})
            sums = dict.fromkeys(sums, 0.0)
    return windows[: protocol.windows]


def _reference(name: str, cfg: DictConfig, cells: int, precision: str, protocol: Protocol) -> dict[str, Any]:
    """Run one reference in a process of its own."""
    given = {
        "name": name,
        "cfg": OmegaConf.to_container(OmegaConf.merge(cfg, {"precision": precision})),
        "batch": cells,
        "protocol": asdict(protocol),
    }
    command = [sys.executable, "-m", "megacell.geneformer.bench_train_references", json.dumps(given)]
    answer = subprocess.run(command, capture_output=True, text=True, check=False)
    if answer.returncode:
        raise DataError(f"{name}: {_ended(answer.returncode, answer.stderr)}")
    return {**_figures([json.loads(line) for line in answer.stdout.splitlines() if line.startswith("{")]), "ranks": 1}


def _ended(code: int, said: str) -> str:
    """Say why a process ended that was to go on; torchrun tells of its ranks' signals in words."""
    if code == -signal.SIGKILL or "Signal 9 (SIGKILL)" in said:
        return "killed, most likely for want of memory; give fewer cells a step"
    return f"ended by itself with {code}: {said.strip()[-2000:]}"


def _figures(windows: list[dict[str, float]]) -> dict[str, Any]:
    """Return the medians over windows."""

    def rate(name: str) -> float:
        return median(window[name] / window["seconds"] for window in windows)

    figures: dict[str, Any] = {
        "tokens_per_second": rate("tokens"),
        "cells_per_second": rate("cells"),
        "windows_tokens_per_second": [window["tokens"] / window["seconds"] for window in windows],
        "steps_a_window": [int(window["steps"]) for window in windows],
        "seconds_a_window": [window["seconds"] for window in windows],
        "data_wait": rate("data_seconds"),
        "memory_gib": max(window["memory_gib"] for window in windows),
    }
    if "padded_tokens" in windows[0]:
        figures["padded_tokens_per_second"] = rate("padded_tokens")
        figures["real_of_computed"] = median(window["tokens"] / window["padded_tokens"] for window in windows)
    if "engine_seconds" in windows[0]:
        figures["outside_the_engine"] = 1 - rate("engine_seconds")
    return figures


def flops_a_token(cfg: DictConfig, lengths: np.ndarray, vocabulary: int) -> float:
    """Return the FLOPs that one real token requires, forward and backward: 3 [L (8h² + 4hf + 4sh) + ρ (2h² + 2hV)].

    s is the mean length that a token attends over, Σℓ² / Σℓ; ρ the share of positions that the head sees.
    """
    layers, hidden, ffn = cfg.model.layers, cfg.model.hidden, cfg.model.ffn
    seen = float((lengths.astype(np.float64) ** 2).sum() / lengths.sum())
    body = layers * (8 * hidden**2 + 4 * hidden * ffn + 4 * seen * hidden)
    return float(3 * (body + cfg.data.masking.rate * (2 * hidden**2 + 2 * hidden * vocabulary)))


def _of_each_rank(figures: dict[str, Any], flops: float) -> dict[str, float]:
    """Return real tokens a second a rank, and the share of the peak that the required FLOPs take, where it is known."""
    rate, peak = figures["tokens_per_second"] / figures["ranks"], peak_flops()
    return {"tokens_per_second_a_rank": rate, **({"mfu": rate * flops / peak} if peak else {})}


def peak_flops() -> float | None:
    """Return the accelerator's dense 16-bit FLOP/s as its vendor states them; None where they are not known."""
    name = accelerator() or ""
    return next((tflops * 1e12 for part, tflops in PEAKS.items() if part in name), None)


def accelerator() -> str | None:
    """Return the GPU's name, if there is one."""
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else None


def line(name: str, figures: dict[str, Any]) -> str:
    """Return one contender's rate in words."""
    extra = f", {figures['mfu']:.1%} MFU" if "mfu" in figures else ""
    return f"{name}: {figures['tokens_per_second']:,.0f} real tokens/s{extra}"
