# SPDX-License-Identifier: Apache-2.0
"""`megacell bench embed`: cells embedded a second, beside Hugging Face's BERT with padding, and models opened.

Protocol: one process, the same random weights and the same cells in both, float32. Ours starts from counts, Hugging
Face from tokens that are already made. Its cells are padded together as each package does by default (`CONTENDERS`),
and then computed a few at a time, which takes less memory and no longer. Every round runs each contender once, after
one that warms up, so that what else the machine does meets all of them; a figure is the median over rounds, and so is
each ratio. Before anything counts, the embeddings are seen to agree.
"""

import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import scipy.sparse as sp
import torch
from omegaconf import OmegaConf

from megacell.core.errors import DataError
from megacell.core.machine import where_and_when
from megacell.geneformer.embedding.embedder import Embedder
from megacell.geneformer.embedding.inputs import open_input
from megacell.geneformer.interchange import hugging_face
from megacell.geneformer.model.config import ModelConfig
from megacell.geneformer.model.geneformer_model import GeneformerModel
from megacell.geneformer.model.initial_weights import initialise
from megacell.geneformer.pretraining.family import GENEFORMER
from megacell.geneformer.vocabulary.vocabulary import Vocabulary
from megacell.training.distributed import device

LAYER = "second_to_last"
AGREE = 1e-5  # the most that embeddings may differ, in absolute or relative terms
FIXED = "hugging_face_fixed"
Run = Callable[[], np.ndarray]


@dataclass(frozen=True)
class Way:
    """How cells are padded and computed: see `CONTENDERS`.

    Attributes
    ----------
    by_length : bool
        Longest first.
    head : bool
        Whether logits are computed, too.
    together : function
        How many of so many cells are padded to the longest among them; those of one forward pass without it.
    whole : bool
        They are padded to the model's length instead.
    """

    by_length: bool
    head: bool
    together: Callable[[int], int] | None = None
    whole: bool = False


CONTENDERS = {
    # Geneformer's EmbExtractor: 1,000 cells by length, 100 at a time; of fewer a tenth, so that as much is padding
    "as_emb_extractor": Way(by_length=True, head=True, together=lambda cells: min(100, -(-cells // 10))),
    # Helical: in the cells' order, 24 at a time
    "as_helical": Way(by_length=False, head=True, together=lambda cells: 24),
    # of no package: what is left where the least is padded, and only the layers are computed; and the most padding
    "hugging_face_sorted_without_head": Way(by_length=True, head=False),
    FIXED: Way(by_length=False, head=True, whole=True),
}


def bench_embed(
    data: Path, vocabulary: Vocabulary, model: str, cells: int, batch: int, rounds: int, contenders: list[str]
) -> dict[str, Any]:
    """Measure embedding.

    Parameters
    ----------
    data : Path
        A store, or a file as for `convert`; its first cells are taken.
    vocabulary : Vocabulary
    model : str
        Of the published configurations.
    cells : int
        How many; of the contender that pads to the model's length a batch is enough.
    batch : int
        Cells of one forward pass of Hugging Face's.
    rounds : int
    contenders : list of str
        Of `CONTENDERS`.

    Returns
    -------
    dict
        In JSON's types.

    Raises
    ------
    DataError
        The embeddings do not agree, or there are fewer cells.
    """
    own = random_model(model, vocabulary)
    with open_input(data) as given:
        embedder = Embedder(own, given.gene_ids, given.symbols, layer=LAYER)
        rows = sp.vstack(list(given.rows(0, min(cells, len(given))))).tocsr()
    tokens = [
        packed.tokens[a:b] for packed in embedder.packs(rows) for a, b in pairwise(packed.starts.tolist())
    ]  # fmt: skip
    if len(tokens) != rows.shape[0]:
        raise DataError(f"{data}: has cells without a gene of {vocabulary.name} among the first; leave them out")
    runs: dict[str, tuple[Run, int]] = {"megacell": (lambda: embedder.embed(rows)[0], len(tokens))}
    with tempfile.TemporaryDirectory() as folder:
        theirs = _hugging_face(own, Path(folder))
    filled: dict[str, float] = {}
    for name in contenders:
        way, few = CONTENDERS[name], tokens[:batch] if name == FIXED else tokens
        passes = widths(way, np.array([len(cell) for cell in few]), batch, own.sizes.max_length)
        runs[name] = (_padded(theirs if way.head else theirs.base_model, few, passes, vocabulary), len(few))
        filled[name] = sum(map(len, few)) / sum(len(part) * width for part, width in passes)
    apart = {name: _apart(run(), runs["megacell"][0]()[:n], name) for name, (run, n) in runs.items()}
    rates: dict[str, list[float]] = {name: [] for name in runs}
    of_cpu: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, (run, n) in runs.items():
            start, cpu = time.perf_counter(), time.process_time()
            run()
            rates[name].append(n / (time.perf_counter() - start))
            of_cpu[name].append(n / (time.process_time() - cpu))
    lengths = [len(cell) for cell in tokens]
    return {
        **where_and_when(),
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "threads": torch.get_num_threads(),
        "model": {"name": model, **own.sizes.to_dict()},
        "precision": "fp32",
        "layer": LAYER,
        "batch": batch,
        "tokens_a_cell": {str(q): int(np.quantile(lengths, q)) for q in (0.0, 0.25, 0.5, 0.75, 1.0)},
        "filled": filled,
        "cells": {name: n for name, (_, n) in runs.items()},
        "rounds_cells_per_second": rates,
        "cells_per_second": {name: median(own) for name, own in rates.items()},
        "cells_per_cpu_second": {name: median(own) for name, own in of_cpu.items()},
        "times": {name: _times(rates, name) for name in contenders},
        "times_of_cpu": {name: _times(of_cpu, name) for name in contenders},
        "largest_difference": apart,
    }


def random_model(name: str, vocabulary: Vocabulary) -> GeneformerModel:
    """Return a published configuration with random weights."""
    values = OmegaConf.to_container(OmegaConf.load(GENEFORMER.configs / "model" / f"{name}.yaml"))
    assert isinstance(values, dict)
    network = ModelConfig.of({**{str(k): v for k, v in values.items()}, "vocabulary_size": vocabulary.size})
    cfg = {"network": network.to_dict(), "precision": "fp32", "vocabulary": vocabulary.hash, "provenance": {"step": 0}}
    model = GeneformerModel(OmegaConf.create(cfg))
    with device.single_process():
        initialise(model.bert, network, seed=0)
    model.vocabulary = vocabulary
    return model.to(device.device()).eval()


def _hugging_face(model: GeneformerModel, folder: Path) -> Any:
    """Return the same network as `transformers` loads it."""
    import transformers

    hugging_face.save(model, folder / "model")
    kind = getattr(transformers, hugging_face.ARCHITECTURES[model.sizes.norm])
    return kind.from_pretrained(folder / "model").to(device.device()).eval()


def widths(way: Way, lengths: np.ndarray, batch: int, longest: int) -> list[tuple[np.ndarray, int]]:
    """Return which cells each forward pass takes, at most ``batch``, and what they are padded to."""
    order = np.argsort(-lengths, kind="stable") if way.by_length else np.arange(len(lengths))
    together = way.together(len(lengths)) if way.together else batch
    passes = []
    for group in (order[i : i + together] for i in range(0, len(order), together)):
        width = longest if way.whole else int(lengths[group].max())
        passes += [(group[i : i + batch], width) for i in range(0, len(group), batch)]
    return passes


def _padded(network: Any, cells: list[np.ndarray], passes: list[tuple[np.ndarray, int]], vocabulary: Vocabulary) -> Run:
    """Return what embeds padded cells, and puts them back into their order."""
    before, after = len(vocabulary.prefix), len(vocabulary.suffix)
    pad, where = vocabulary.specials["pad"], device.device()

    @torch.inference_mode()
    def run() -> np.ndarray:
        out = np.empty((len(cells), network.config.hidden_size), np.float32)
        for part, width in passes:
            lengths = torch.tensor([len(cells[i]) for i in part])
            tokens = torch.full((len(part), width), pad)
            for row, i in zip(tokens, part, strict=True):
                row[: len(cells[i])] = torch.from_numpy(cells[i].astype(np.int64))
            places = torch.arange(width)
            mask = (places < lengths[:, None]).long()
            inside = ((places >= before) & (places < lengths[:, None] - after)).to(where, torch.float32)[..., None]
            given = network(tokens.to(where), attention_mask=mask.to(where), output_hidden_states=True)
            out[part] = ((given.hidden_states[-2] * inside).sum(1) / inside.sum(1)).cpu().numpy()
        return out

    return run


def _times(rates: dict[str, list[float]], name: str) -> float:
    """Return how many times ours is as fast: the median over rounds."""
    return median(a / b for a, b in zip(rates["megacell"], rates[name], strict=True))


def _apart(one: np.ndarray, other: np.ndarray, name: str) -> float:
    """Return the largest difference; refuse to measure two that do not compute the same."""
    if not np.allclose(one, other, rtol=AGREE, atol=AGREE):
        raise DataError(f"{name}: its embeddings differ by {np.abs(one - other).max():.1e}; nothing was measured")
    return float(np.abs(one - other).max())


def bench_files(vocabulary: Vocabulary, model: str, rounds: int) -> dict[str, Any]:
    """Measure a Hugging Face directory's conversion to .nemo and back, and that file's opening, in fresh processes."""
    with tempfile.TemporaryDirectory(prefix="megacell-bench-") as folder:
        directory, archive = Path(folder) / "model", Path(folder) / "model.nemo"
        back = Path(folder) / "back"
        hugging_face.save(random_model(model, vocabulary), directory)
        converted, returned = [], []
        for _ in range(rounds):
            archive.unlink(missing_ok=True)
            converted.append(_child(directory, archive))
            shutil.rmtree(back, ignore_errors=True)
            returned.append(_child(archive, back))
        opened = [_child(archive) for _ in range(rounds)]
        size = archive.stat().st_size
    return {
        "model": model,
        "mib": size / 2**20,
        "convert_seconds": median(run["seconds"] for run in converted),
        "convert_memory_of_its_size": max(run["bytes"] for run in converted) / size,
        "return_seconds": median(run["seconds"] for run in returned),
        "return_memory_of_its_size": max(run["bytes"] for run in returned) / size,
        "open_seconds": median(run["seconds"] for run in opened),
        "open_cpu_seconds": median(run["cpu_seconds"] for run in opened),
        "open_memory_of_its_size": max(run["bytes"] for run in opened) / size,
        "imports_seconds": median(run["imports_seconds"] for run in opened),
    }


def _child(*paths: Path) -> dict[str, float]:
    command = [sys.executable, "-m", "megacell.geneformer.bench_embed_files", *map(str, paths)]
    answer = subprocess.run(command, capture_output=True, text=True, check=False)
    if answer.returncode:
        raise DataError(f"{paths[0]}: could not be opened: {answer.stderr.strip()[-2000:]}")
    figures: dict[str, float] = json.loads(answer.stdout.splitlines()[-1])
    return figures


def table(figures: dict[str, Any]) -> str:
    """Return the figures as lines for a reader."""
    where = figures["accelerator"] or f"{figures['hardware']['processor']}, {figures['threads']} threads"
    lines = [
        f"{figures['date']}, {where}, load {figures['load_average_before']:.1f} before; {figures['model']['name']}, "
        f"fp32, layer {figures['layer']}, padded cells computed {figures['batch']} at a time",
        f"tokens a cell (quartiles) {' '.join(map(str, figures['tokens_a_cell'].values()))}; embeddings agree to "
        f"{max(figures['largest_difference'].values()):.0e}",
        f"{'':36}{'cells/s':>10}{'megacell is':>14}{'in CPU time':>14}{'not padding':>14}",
    ]
    for name, rate in figures["cells_per_second"].items():
        times = [figures[of][name] for of in ("times", "times_of_cpu") if name in figures[of]]
        share = f"{figures['filled'][name]:14.0%}" if name in figures["filled"] else ""
        lines.append(f"{name:36}{rate:10,.2f}" + "".join(f"{value:12.1f} x" for value in times) + share)
    if files := figures.get("files"):
        lines += [
            f"{files['model']}, {files['mib']:,.0f} MiB, after imports of {files['imports_seconds']:.1f} s:",
            f"converted in {files['convert_seconds']:.1f} s, {files['convert_memory_of_its_size']:.1f} times its size; "
            f"back in {files['return_seconds']:.1f} s, {files['return_memory_of_its_size']:.1f} times",
            f"opened in {files['open_seconds']:.1f} s ({files['open_cpu_seconds']:.1f} s of CPU), "
            f"{files['open_memory_of_its_size']:.1f} times its size",
        ]
    return "\n".join(lines)
