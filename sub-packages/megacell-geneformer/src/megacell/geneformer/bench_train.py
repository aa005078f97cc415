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
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from omegaconf import DictConfig, OmegaConf

from megacell.geneformer.training import settings
from megacell.store.errors import DataError
from megacell.store.measured_on import where_and_when

ENDLESS = 1_000_000  # steps; a signal ends the run
PEAKS = {  # dense 16-bit TFLOP/s as the vendor states them, by a part of the GPU's name
    "A100": 312.0,
    "H100": 989.0,
    "H200": 989.0,
}


@dataclass(frozen=True)
class Protocol:
    """How long is measured: a window ends with its steps or its seconds, whichever is first."""

    warmup: int = 20
    steps: int = 200
    seconds: float = 30.0
    windows: int = 3


def bench_train(
    overrides: list[str], references: list[str], batches: list[int], protocol: Protocol, log: Any = print
) -> dict[str, Any]:
    """Measure one configuration of `megacell pretrain`, and references on the same cells.

    Parameters
    ----------
    overrides : list of str
        As for `megacell pretrain`, without ``out``.
    references : list of str
        Of ``hugging_face``, ``hugging_face_grouped`` and ``stock_megatron``.
    batches : list of int
        Cells a step of the references, each of which is measured with each.
    protocol : Protocol

    Returns
    -------
    dict
        In JSON's types.

    Raises
    ------
    DataError
        A contender failed; names it and says what it said.
    """
    with tempfile.TemporaryDirectory(prefix="megacell-bench-") as folder:
        cfg = settings.compose([*overrides, f"out={folder}/run"])
        lengths, vocabulary = _lengths(cfg)
        contenders = {"megacell": _ours(overrides, Path(folder) / "run", cfg.devices, protocol)}
        log(_line("megacell", contenders["megacell"]))
        for name in references:
            for batch in batches:
                key = f"{name}, {batch} cells"
                contenders[key] = _reference(name, cfg, batch, protocol)
                log(_line(key, contenders[key]))
    flops = flops_a_token(cfg, lengths, vocabulary)
    return {
        **where_and_when(),
        "accelerator": _accelerator(),
        "settings": {
            "overrides": [o for o in overrides if o.split("=")[0] not in ("store", "vocabulary")],
            "model": OmegaConf.to_container(cfg.model),
            "precision": cfg.precision,
            "devices": cfg.devices,
        },
        "protocol": asdict(protocol),
        "tokens_a_cell": {str(q): int(np.quantile(lengths, q)) for q in (0.0, 0.25, 0.5, 0.75, 1.0)},
        "required_flops_a_token": flops,
        "flops_convention": "3 x forward; attention over each cell; the head at masked positions only",
        "contenders": {name: {**each, **_mfu(each, flops)} for name, each in contenders.items()},
        "times": {
            name: contenders["megacell"]["tokens_per_second"] / each["tokens_per_second"]
            for name, each in contenders.items()
            if name != "megacell"
        },
    }


def _lengths(cfg: DictConfig) -> tuple[np.ndarray, int]:
    """Return the tokens of each training cell, as cut to the model's length, and the vocabulary's size."""
    from megacell.geneformer.training.data import TrainingData

    data = TrainingData.open(cfg)
    around = len(data.vocabulary.prefix) + len(data.vocabulary.suffix)
    return np.minimum(data.lengths[data.train[:]].astype(np.int64) + around, cfg.model.max_length), data.vocabulary.size


def _ours(overrides: list[str], out: Path, devices: int, protocol: Protocol) -> dict[str, Any]:
    """Run `megacell pretrain` until enough windows are in its metrics.csv."""
    settings_of_bench = (
        f"out={out}", f"steps={ENDLESS}", f"validation.every={ENDLESS}", f"checkpoint.every={ENDLESS}", "log_every=1",
        "validation.cells=64", "data.baseline_cells=1000", "optim.warmup=1000",
    )  # fmt: skip
    command = [sys.executable, "-m", "megacell.store.cli", "pretrain", *overrides, *settings_of_bench]
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
            raise DataError(f"megacell pretrain ended by itself: {said.read().strip()[-2000:]}")
    return {**_figures(windows), "ranks": devices}


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


def _reference(name: str, cfg: DictConfig, batch: int, protocol: Protocol) -> dict[str, Any]:
    """Run one reference in a process of its own."""
    given = {
        "name": name,
        "cfg": OmegaConf.to_container(cfg),
        "batch": batch,
        "protocol": asdict(protocol),
    }
    command = [sys.executable, "-m", "megacell.geneformer.bench_train_references", json.dumps(given)]
    answer = subprocess.run(command, capture_output=True, text=True, check=False)
    if answer.returncode:
        raise DataError(f"{name} with {batch} cells failed: {answer.stderr.strip()[-2000:] or answer.returncode}")
    return _figures([json.loads(line) for line in answer.stdout.splitlines() if line.startswith("{")])


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


def _mfu(figures: dict[str, Any], flops: float) -> dict[str, float]:
    """Return the share of the accelerator's peak that the required FLOPs take, where the peak is known."""
    name = _accelerator() or ""
    peak = next((tflops for part, tflops in PEAKS.items() if part in name), None)
    if peak is None:
        return {}
    return {"mfu": figures["tokens_per_second"] * flops / (peak * 1e12 * figures.get("ranks", 1))}


def _accelerator() -> str | None:
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else None


def _line(name: str, figures: dict[str, Any]) -> str:
    extra = f", {figures['mfu']:.1%} MFU" if "mfu" in figures else ""
    return f"{name}: {figures['tokens_per_second']:,.0f} real tokens/s{extra}"


def table(figures: dict[str, Any]) -> str:
    """Return the figures as lines for a reader."""
    own = figures["contenders"]
    where = figures["accelerator"] or f"{figures['hardware']['processor']}, {figures['hardware']['cores']} cores"
    lines = [
        f"{figures['date']}, {where}, " + ", ".join(f"{name} {v}" for name, v in figures["versions"].items()),
        f"{figures['settings']['precision']}, {figures['settings']['devices']} process(es), tokens a cell (quartiles) "
        + " ".join(str(n) for n in figures["tokens_a_cell"].values()),
        f"{'':34}{'real tokens/s':>14}{'cells/s':>10}{'real':>7}{'wait':>7}{'GiB':>7}{'megacell is':>13}",
    ]
    for name, each in own.items():
        times = figures["times"].get(name)
        lines.append(
            f"{name:34}{each['tokens_per_second']:14,.0f}{each['cells_per_second']:10,.1f}"
            f"{each.get('real_of_computed', 1):7.0%}{each['data_wait']:7.1%}{each['memory_gib']:7.1f}"
            + (f"{times:11.1f} x" if times else "")
        )
    lines.append(f"time outside the engine's steps: {own['megacell']['outside_the_engine']:.1%}")
    return "\n".join(lines)


def chart(figures: dict[str, Any], path: Path) -> None:
    """Draw the contenders' real tokens a second as bars."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    own = figures["contenders"]
    names, rates = list(own), [each["tokens_per_second"] for each in own.values()]
    figure, axes = plt.subplots(figsize=(7, 0.6 + 0.5 * len(names)), layout="constrained")
    bars = axes.barh(names, rates, color=["#2a6f97"] + ["#b0b7bf"] * (len(names) - 1))
    axes.bar_label(bars, [f"{rate:,.0f}" for rate in rates], padding=3)
    axes.invert_yaxis()
    axes.margins(x=0.15)
    axes.set_xlabel("real tokens a second")
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    figure.savefig(path, dpi=150)
    plt.close(figure)
