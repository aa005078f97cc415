# SPDX-License-Identifier: Apache-2.0
"""One task of Megacell's in a process of its own; prints its figures as JSON.

python benchmarks/run_megacell.py convert WORKERS OUT FILE...
python benchmarks/run_megacell.py read STORE WORKERS SECONDS      through torch's DataLoader, workers spawned
python benchmarks/run_megacell.py processes STORE N SECONDS       N spawned processes, each of which keeps its rows
python benchmarks/run_megacell.py h5py FILE                       merely reads a file's matrix
python benchmarks/run_megacell.py open STORE                      opens a store, reads a random batch
"""

import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from measuring import BATCH, REPEATS, rates, size_of, timed


def convert(workers: str, out: str, *files: str) -> dict[str, float]:
    """Convert files."""
    from megacell.store import convert
    from megacell.store.conversion.warm_up import prepare

    prepare()  # imports, which the peers do before they are timed too
    return {**timed(lambda: convert(files, out, workers=int(workers))), "bytes": size_of(Path(out))}


class Batches:
    """A store as torch's DataLoader takes it: a list of cells gives their rows as tensors."""

    def __init__(self, store: Any) -> None:
        self.store = store

    def __len__(self) -> int:
        return len(self.store)

    def __getitem__(self, cells: list[int]) -> tuple[Any, ...]:
        import torch

        rows = self.store.rows(np.array(cells))
        return tuple(torch.from_numpy(array) for array in (rows.indptr, rows.indices, rows.data))


def read(store: str, workers: str, seconds: str) -> dict[str, float]:
    """Read random batches."""
    from torch.utils.data import BatchSampler, DataLoader, RandomSampler

    from megacell.store import CellStore

    data: Any = Batches(CellStore.open(store))
    random = BatchSampler(RandomSampler(data, replacement=True, num_samples=1 << 30), BATCH, drop_last=False)
    context = "spawn" if int(workers) else None
    loader = DataLoader(
        data, sampler=random, batch_size=None, num_workers=int(workers), multiprocessing_context=context
    )

    def batches() -> Iterator[int]:
        for indptr, _, _ in loader:
            yield len(indptr) - 1

    return rates(batches(), float(seconds))


def _keep_reading(store: Any, barrier: Any, seconds: float, rows: Any) -> None:
    cells, random = len(store), np.random.default_rng(os.getpid())
    store.rows(random.integers(0, cells, BATCH))
    barrier.wait()
    n, start = 0, time.perf_counter()
    while time.perf_counter() - start < seconds:
        n += store.rows(random.integers(0, cells, BATCH)).shape[0]
    rows.put(n / (time.perf_counter() - start))


def processes(store: str, n: str, seconds: str) -> dict[str, float]:
    """Read random batches in several processes at once: rows a second of all, median of five runs."""
    from megacell.store import CellStore

    context, opened, found = get_context("spawn"), CellStore.open(store), []
    for _ in range(REPEATS):
        barrier, rows = context.Barrier(int(n)), context.SimpleQueue()
        arguments = (opened, barrier, float(seconds) / REPEATS, rows)
        workers = [context.Process(target=_keep_reading, args=arguments) for _ in range(int(n))]
        for worker in workers:
            worker.start()
        found.append(sum(rows.get() for _ in workers))
        for worker in workers:
            worker.join()
    return {"rows_per_second": statistics.median(found)}


def tokenize(store: str, vocabulary: str, out: str) -> dict[str, Any]:
    """Rank a store's cells in blocks; write them as Hugging Face's datasets has them; keep the tokens as NumPy's."""
    from megacell.core.buffers import RowBuffer
    from megacell.geneformer import Vocabulary
    from megacell.geneformer.tokens.rank_encoder import RankEncoder
    from megacell.geneformer.tokens.tokenize import CELLS_AT_ONCE
    from megacell.geneformer.tokens.tokenize import tokenize as write_dataset
    from megacell.store import CellStore

    opened, words = CellStore.open(store), Vocabulary.open(vocabulary)
    encoder, buffer, found = RankEncoder(opened.gene_ids, opened.symbols, words), RowBuffer(), list[Any]()

    def rank() -> None:
        found.clear()
        for first in range(0, len(opened), CELLS_AT_ONCE):
            cells = np.arange(first, min(first + CELLS_AT_ONCE, len(opened)))
            found.append(encoder.encode(*opened.gather(cells, buffer)))

    rank()  # loads what is compiled
    ranking, writing = timed(rank), timed(lambda: write_dataset(opened, words, Path(out) / "dataset"))
    lengths = np.concatenate([np.diff(cu_lengths) for _, cu_lengths in found])
    np.savez(Path(out) / "tokens.npz", tokens=np.concatenate([tokens for tokens, _ in found]), lengths=lengths)
    return {"cells": len(lengths), "ranking": ranking, "writing": writing}


def h5py(file: str) -> dict[str, float]:
    """Read a file's sparse matrix."""
    import h5py

    def work() -> None:
        with h5py.File(file, "r") as opened:
            for name in ("indptr", "indices", "data"):
                opened["X"][name][()]

    return timed(work)


def open_store(store: str) -> dict[str, float]:
    """Open a store and read a random batch; then cells of every shard."""
    from megacell.core.machine import own_memory
    from megacell.store import CellStore

    def descriptors() -> int:
        return len(os.listdir("/proc/self/fd"))

    def anonymous() -> float:
        return own_memory() / 2**20

    before, start, cpu = anonymous(), time.perf_counter(), time.process_time()
    opened = CellStore.open(store)
    opening = time.perf_counter() - start
    opened.rows(np.random.default_rng(0).integers(0, len(opened), BATCH))
    found = {
        "cells": len(opened),
        "sources": len(opened.sources),
        "seconds_to_open": opening,
        "seconds_to_first_batch": time.perf_counter() - start,
        "cpu_seconds_to_first_batch": time.process_time() - cpu,
        "mib_more_than_before": anonymous() - before,
        "descriptors": descriptors(),
    }
    firsts = np.cumsum([0] + [shard.cells for shard in opened.manifest.shards])[:-1]
    opened.rows(firsts)
    return {**found, "descriptors_after_a_cell_of_each_shard": descriptors()}


if __name__ == "__main__":
    tasks: dict[str, Callable[..., object]] = {
        "convert": convert,
        "read": read,
        "processes": processes,
        "tokenize": tokenize,
        "h5py": h5py,
        "open": open_store,
    }
    print(json.dumps(tasks[sys.argv[1]](*sys.argv[2:])))
