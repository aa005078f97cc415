# SPDX-License-Identifier: Apache-2.0
"""How steps are best made ahead: by 0, 1, 2 or 4 threads, or by another process that sends them over.

    python benchmarks/loader.py CELLS GENEFORMER [--cells 20000] [--seconds 5] [--json results.json]

CELLS, GENEFORMER and the cells: as for batches.py. Three figures for each way: cells a second where the consumer does
nothing else; cells a CPU-second of all processes; and the share of the time that a consumer waits whose own step takes
twice as long as making one does (it sleeps, as a process does that waits for its GPU). Median of five, in turns.
"""

import argparse
import json
import multiprocessing
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from batches import real_like
from dictionaries import published_vocabulary

from megacell.geneformer.tokens.lengths import token_lengths
from megacell.geneformer.tokens.packing import MicroBatch
from megacell.geneformer.tokens.stream import token_stream
from megacell.geneformer.vocabulary.vocabulary import Vocabulary
from megacell.store import CellStore, convert
from megacell.store.sampling.batch_stream import BatchStream

GLOBAL_BATCH, TOKEN_BUDGET, DEPTH = 256, 65_536, 2
THREADS = (0, 1, 2, 4)


def open_stream(store: CellStore, vocabulary: Vocabulary) -> BatchStream[MicroBatch]:
    """Return the stream that every way makes steps of."""
    lengths = token_lengths(store, vocabulary)
    return token_stream(
        store, vocabulary, np.flatnonzero(lengths), lengths,
        max_length=2048, global_batch=GLOBAL_BATCH, token_budget=TOKEN_BUDGET, seed=0,
    )  # fmt: skip


def _serve(pipe: Any, allowed: Any, store: CellStore, vocabulary: Vocabulary) -> None:
    stream, k = open_stream(store, vocabulary), 0
    while True:
        batches = stream.step(k)
        k += 1
        allowed.acquire()
        pipe.send(batches)


class Process:
    """The same steps from another process, pickled through a pipe, as many ahead as one thread would be."""

    def __init__(self, store: CellStore, vocabulary: Vocabulary) -> None:
        context = multiprocessing.get_context("spawn")
        self.wait_seconds = 0.0
        self._mine, theirs = context.Pipe(duplex=False)
        self._allowed = context.Semaphore(DEPTH)
        self._process = context.Process(target=_serve, args=(theirs, self._allowed, store, vocabulary), daemon=True)
        self._process.start()

    def __iter__(self) -> Iterator[Any]:
        while True:
            start = time.perf_counter()
            batches = self._mine.recv()
            self.wait_seconds += time.perf_counter() - start
            self._allowed.release()
            yield batches

    def __enter__(self) -> "Process":
        return self

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        self._process.join()


def cpu_seconds(other: int | None) -> float:
    """Return the CPU time of this process, and of another."""
    own = time.process_time()
    if other is None:
        return own
    fields = Path(f"/proc/{other}/stat").read_text().rpartition(")")[2].split()
    return own + (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def measure(way: str, store: CellStore, vocabulary: Vocabulary, seconds: float, pause: float) -> dict[str, float]:
    """Consume steps for so many seconds, resting after each; return rates and the share of waiting."""
    threads = None if way == "process" else int(way)
    if threads is None:
        source: Any = Process(store, vocabulary)
    else:
        source = open_stream(store, vocabulary).prefetched(0, threads=threads, depth=DEPTH)
    with source as ahead:
        steps = iter(ahead)
        for _ in range(3):  # start, compile, fill
            next(steps)
        other = source._process.pid if threads is None else None
        cells, start, cpu, waited = 0, time.perf_counter(), cpu_seconds(other), ahead.wait_seconds
        while time.perf_counter() - start < seconds:
            cells += sum(len(batch.cells) for batch in next(steps))
            if pause:
                time.sleep(pause)
        elapsed = time.perf_counter() - start
        return {
            "cells_a_second": cells / elapsed,
            "cells_a_cpu_second": cells / (cpu_seconds(other) - cpu),
            "waiting": (ahead.wait_seconds - waited) / elapsed,
        }


def compare(store: CellStore, vocabulary: Vocabulary, seconds: float) -> dict[str, Any]:
    """Measure every way in turns; return medians."""
    ways = [*map(str, THREADS), "process"]
    alone = measure("0", store, vocabulary, seconds, 0)["cells_a_second"]
    pause = 2 * GLOBAL_BATCH / alone
    found: dict[str, list[dict[str, float]]] = {way: [] for way in ways}
    for _ in range(5):
        for way in ways:
            free, busy = (measure(way, store, vocabulary, seconds, rest) for rest in (0, pause))
            found[way].append({**free, "waiting": busy["waiting"]})
    medians = {
        way: {name: float(np.median([run[name] for run in runs])) for name in runs[0]} for way, runs in found.items()
    }
    return {"step_of_the_consumer_ms": pause * 1000, "ways": medians}


def main() -> None:
    """Make the cells, convert, import, measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sources", type=Path, nargs="+", metavar="CELLS")
    parser.add_argument("geneformer", type=Path, metavar="GENEFORMER")
    parser.add_argument("--cells", type=int, default=20_000, help="to make (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=5.0, help="a measurement (default: %(default)s)")
    parser.add_argument("--json", type=Path, help="write the figures here too")
    args = parser.parse_args()
    vocabulary = published_vocabulary(args.geneformer)
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as folder:
        convert(args.sources, Path(folder) / "real")
        real_like(CellStore.open(Path(folder) / "real"), args.cells, Path(folder) / "cells.h5ad")
        convert([Path(folder) / "cells.h5ad"], Path(folder) / "store")
        figures = compare(CellStore.open(Path(folder) / "store"), vocabulary, args.seconds)
    figures = {"cores": os.cpu_count(), "load_average_before": load, "cells_of_a_step": GLOBAL_BATCH, **figures}
    print(f"{figures['cores']} cores, load {load:.1f}; {GLOBAL_BATCH} cells a step, a consumer's step of "
          f"{figures['step_of_the_consumer_ms']:.0f} ms")  # fmt: skip
    print(f"{'':12}{'cells/s':>12}{'cells/CPU-s':>14}{'waiting':>10}")
    for way, row in figures["ways"].items():
        name = "a process" if way == "process" else f"{way} threads"
        print(f"{name:12}{row['cells_a_second']:12,.0f}{row['cells_a_cpu_second']:14,.0f}{row['waiting']:10.1%}")
    if args.json:
        args.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
