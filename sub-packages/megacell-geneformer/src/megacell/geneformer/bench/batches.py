# SPDX-License-Identifier: Apache-2.0
"""`megacell bench batches`: how many cells a CPU-second become ranked, masked, packed batches, and how even those are.

Protocol: one process; pages warm; every rate the median of three runs after one that warms up, in cells a second of
this process's CPU time, all three ways checked to make the same tokens of the same cells before anything is timed. Two
threads are timed by the clock, since that is what they are for.
"""

import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from megacell.core.errors import DataError
from megacell.core.machine import own_memory, where_and_when
from megacell.geneformer.bench.batches_references import References
from megacell.geneformer.tokens.lengths import token_lengths
from megacell.geneformer.tokens.packing import MicroBatch
from megacell.geneformer.tokens.stream import token_stream
from megacell.geneformer.vocabulary.medians import gene_medians
from megacell.geneformer.vocabulary.vocabulary import Vocabulary
from megacell.store import CellStore
from megacell.store.sampling.batch_stream import BatchStream
from megacell.store.sampling.sharing import share_out

GLOBAL_BATCH, TOKEN_BUDGET = 512, 65_536
REFERENCE_CELLS = 512
RANKS, RANKED_BATCH = 64, 2048  # of the imbalance that is reported


def bench_batches(store: CellStore, vocabulary: Vocabulary, seconds: float = 5.0) -> dict[str, Any]:
    """Measure the way from store to batches.

    Parameters
    ----------
    store : CellStore
    vocabulary : Vocabulary
    seconds : float
        Of each measurement.

    Returns
    -------
    dict
        Figures, hardware and versions, in JSON's types.

    Raises
    ------
    DataError
        The three ways do not make the same tokens.
    """
    lengths = token_lengths(store, vocabulary)
    cells = np.flatnonzero(lengths)
    stream = token_stream(
        store, vocabulary, cells, lengths,
        max_length=vocabulary.max_length, global_batch=GLOBAL_BATCH, token_budget=TOKEN_BUDGET, seed=0,
    )  # fmt: skip
    references = _agreeing(stream, store, vocabulary)
    before = own_memory()
    rates = {
        "megacell": _rate(lambda k: sum(len(batch.cells) for batch in stream.step(k)), seconds),
        "numpy_a_cell": _rate(references.by_numpy, seconds),
        "dictionary_a_gene": _rate(references.by_dictionary, seconds),
    }
    inputs = np.minimum(lengths[cells].astype(np.int64) + _around(vocabulary), vocabulary.max_length)
    return {
        **where_and_when(),
        "store": {"cells": len(store), "genes": store.shape[1], "counts_a_cell": _counts_a_cell(store, cells)},
        "vocabulary": vocabulary.name,
        "batch": {"cells": GLOBAL_BATCH, "tokens": TOKEN_BUDGET, "tokens_a_cell": float(inputs.mean())},
        "cells_a_cpu_second": rates,
        "tokens_a_cpu_second": rates["megacell"] * float(inputs.mean()),
        "times_the_dictionary": rates["megacell"] / rates["dictionary_a_gene"],
        "speed_up_of_2_threads": _speed_up(stream, seconds),
        "medians_cells_a_cpu_second": _median_rate(store, cells),
        "memory_mib_beside_page_cache": (own_memory() - before) / 2**20,
        "real_tokens_of_computed": _fill(stream),
        f"imbalance_of_{RANKS}_ranks_at_{RANKED_BATCH}_cells": _imbalance(inputs),
        "not_measured": ["Geneformer's tokenizer as helical ships it"],
    }


def _agreeing(stream: BatchStream[MicroBatch], store: CellStore, vocabulary: Vocabulary) -> References:
    """Return the references, once they have been seen to make the same tokens as the stream."""
    batches = stream.step(0)
    seen = np.concatenate([batch.cells for batch in batches])[:REFERENCE_CELLS]
    references = References(store, vocabulary, seen, vocabulary.max_length)
    row_of = dict(zip(seen.tolist(), references.rows, strict=True))
    for batch in batches:
        truth = batch.tokens.copy()
        truth[batch.masked] = batch.labels
        for i, cell in enumerate(batch.cells.tolist()):
            ours, row = truth[batch.cu_seqlens[i] : batch.cu_seqlens[i + 1]].tolist(), row_of[cell]
            if not ours == references.numpy_cell(row).tolist() == references.dictionary_cell(row):
                raise DataError(f"{store.path}: cell {cell}: the references rank it otherwise; nothing was measured")
    return references


def _rate(work: Callable[[int], int], seconds: float) -> float:
    """Return the cells a CPU-second of ``work(k)``."""
    work(0)
    rates = []
    for _ in range(3):
        cells, k, start = 0, 0, time.process_time()
        while not k or time.process_time() - start < seconds / 3:
            cells += work(k)
            k += 1
        rates.append(cells / (time.process_time() - start))
    return float(np.median(rates))


def _speed_up(stream: BatchStream[MicroBatch], seconds: float) -> float:
    """Return how much faster two threads are than one, by the clock: median of three."""

    def run(threads: int) -> float:
        counted, deadline = [0] * threads, time.perf_counter() + seconds / 6

        def work(number: int) -> None:
            k = number
            while not counted[number] or time.perf_counter() < deadline:  # one at least, however late a thread starts
                stream.step(k)
                counted[number] += 1
                k += threads

        workers = [threading.Thread(target=work, args=(number,)) for number in range(threads)]
        start = time.perf_counter()
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        return sum(counted) / (time.perf_counter() - start)

    return float(np.median([run(2) / run(1) for _ in range(3)]))


def _median_rate(store: CellStore, cells: np.ndarray) -> float:
    gene_medians(store, cells[:256])
    start = time.process_time()
    gene_medians(store, cells)
    return len(cells) / (time.process_time() - start)


def _fill(stream: BatchStream[MicroBatch]) -> float:
    batches = [batch for k in range(4) for batch in stream.step(k)]
    return sum(b.n_tokens for b in batches) / sum(len(b.tokens) for b in batches)


def _imbalance(inputs: np.ndarray) -> float:
    """Return by how much the fullest rank exceeds the mean, as a share: mean of ten batches drawn with replacement."""
    rng = np.random.default_rng(0)
    loads = []
    for _ in range(10):
        drawn = rng.choice(inputs, RANKED_BATCH)
        load = np.bincount(share_out(drawn, RANKS), weights=drawn, minlength=RANKS)
        loads.append(load.max() / load.mean() - 1)
    return float(np.mean(loads))


def _around(vocabulary: Vocabulary) -> int:
    return len(vocabulary.prefix) + len(vocabulary.suffix)


def _counts_a_cell(store: CellStore, cells: np.ndarray) -> float:
    return float(np.diff(store.gather(cells[:REFERENCE_CELLS])[0]).mean())


def table(figures: dict[str, Any]) -> str:
    """Return the figures as lines for a reader."""
    rates = figures["cells_a_cpu_second"]
    hardware, versions, store = figures["hardware"], figures["versions"], figures["store"]
    fill, memory = figures["real_tokens_of_computed"], figures["memory_mib_beside_page_cache"]
    imbalance = figures[f"imbalance_of_{RANKS}_ranks_at_{RANKED_BATCH}_cells"]
    names = {
        "dictionary_a_gene": "a dictionary look-up a gene, counts in memory",
        "numpy_a_cell": "plain numpy a cell, counts in memory",
        "megacell": "megacell, store to packed micro-batches",
    }
    slowest = rates["dictionary_a_gene"]
    return "\n".join([
        f"{figures['date']}, {hardware['processor']}, {hardware['cores']} cores, "
        + ", ".join(f"{name} {version}" for name, version in versions.items()),
        f"{store['cells']:,} cells, {store['counts_a_cell']:,.0f} counts and {figures['batch']['tokens_a_cell']:,.0f} "
        f"tokens a cell, vocabulary {figures['vocabulary']}; one thread, cells a CPU-second",
        *(f"{text:52}{rates[name]:12,.0f}{rates[name] / slowest:9.1f} x" for name, text in names.items()),
        f"{'tokens a CPU-second':52}{figures['tokens_a_cpu_second']:12,.0f}",
        f"{'medians, cells a CPU-second':52}{figures['medians_cells_a_cpu_second']:12,.0f}",
        f"{'two threads, by the clock':52}{figures['speed_up_of_2_threads']:12.2f} x one",
        f"{'real tokens of computed ones':52}{fill:12.2%}",
        f"{f'imbalance of {RANKS} ranks at {RANKED_BATCH:,} cells':52}{imbalance:12.2%}",
        f"{'memory beside the page cache':52}{memory:12,.0f} MiB",
        *(f"not measured: {text}" for text in figures["not_measured"]),
    ])  # fmt: skip
