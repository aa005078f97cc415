# SPDX-License-Identifier: Apache-2.0
"""How training speeds up with processes: weak scaling, measured here, predicted, and computed for up to 512 GPUs.

    python benchmarks/scaling.py CELLS GENEFORMER OPTION=VALUE... [--ranks 1,2] [--json FILE] [--chart FILE]

CELLS: a folder of .h5ad files. GENEFORMER: a folder with V2's dictionaries. OPTION=VALUE: as for `megacell pretrain`.
Measured as `megacell bench train` does it, with as many cells a step for each process. Without GPUs every process is
pinned to a core of its own. From the speed of one process and what a reduction takes by itself, both measured in the
same run, `cost_model.py` predicts the step of several; the error of that is printed.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

import cost_model
from cost_model import Link, Machines
from dictionaries import WITH_NAMES, published_vocabulary
from many_gpus import COMPUTED, GPUS, lines, many_gpus, parameters, work_of

from megacell.core.cli import main as cli
from megacell.core.cli.parsers import table
from megacell.core.machine import where_and_when
from megacell.geneformer.bench.train import Protocol, accelerator, evenness, measure_pretrain, token_counts
from megacell.geneformer.commands.bench_train import add_protocol
from megacell.store import convert
from megacell.training.config import settings

GOAL = 1.8  # times the tokens a second of one process with one core, by two with one core each
SMALL = 4096  # bytes whose reduction takes the latency alone
Figures = dict[str, Any]


class Scaling:
    """The measurements over one store; ``given`` are options of `megacell pretrain`, without ``out``."""

    def __init__(self, given: list[str], folder: Path, cells: int, protocol: Protocol, most: int) -> None:
        self.given, self.folder, self.cells, self.protocol = given, folder, cells, protocol
        self.cores = max(1, len(os.sched_getaffinity(0)) // most) if accelerator() else 1
        os.environ["OMP_NUM_THREADS"] = os.environ["NUMBA_NUM_THREADS"] = str(self.cores)

    def _start(self, ranks: int, first: int, module: str) -> list[str]:
        """Return what starts a module in pinned processes, from the core ``first`` on."""
        agent = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
        pinned = [str(Path(__file__).with_name("run_pinned.py")), str(first), str(self.cores), module]
        return [sys.executable, "-m", *agent, *pinned]

    def options(self, ranks: int) -> list[str]:
        """Return the options of a run: as many cells a step for each process, whatever their number."""
        return [*self.given, f"devices={ranks}", f"batch.cells={ranks * self.cells}"]

    def train(self, ranks: int, name: str, first: int = 0) -> Figures:
        """Measure one run, on the cores from ``first`` on."""
        start = self._start(ranks, first, cli.__name__)
        figures = measure_pretrain(self.options(ranks), self.folder / name, self.protocol, start)
        steps = zip(figures["seconds_a_window"], figures["steps_a_window"], strict=True)
        print(f"{name}: {figures['tokens_per_second']:,.0f} real tokens/s", file=sys.stderr)
        return {**figures, "ranks": ranks, "step_seconds": median(seconds / n for seconds, n in steps)}

    def apart(self, ranks: int) -> float:
        """Return the tokens a second, in all, of as many runs of one process each at once: nothing is exchanged."""
        with ThreadPoolExecutor(ranks) as pool:
            runs = list(pool.map(lambda k: self.train(1, f"{k + 1}-of-{ranks}-apart", k * self.cores), range(ranks)))
        return float(sum(run["tokens_per_second"] for run in runs))

    def link(self, ranks: int, size: int) -> Link:
        """Measure the link between processes by reductions of few and of ``size`` bytes."""
        command = [*self._start(ranks, 0, "run_collectives"), str(SMALL), str(size)]
        answer = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
        few, many = json.loads(answer.splitlines()[-1]).values()
        latency = few / (2 * (ranks - 1))
        return Link(2 * (ranks - 1) / ranks * (size - SMALL) / (many - few), latency)


def measure(scaling: Scaling, counts: list[int], *, apart: bool) -> Figures:
    """Measure each number of processes, predict those above one, and say by how much that was wrong."""
    cfg = settings.compose([*scaling.options(1), "out=unused"])
    _, vocabulary = token_counts(cfg)
    size = cost_model.GRADIENT_BYTES * parameters(cfg, vocabulary)
    runs = {ranks: scaling.train(ranks, f"{ranks}-together") for ranks in counts}
    alone = runs[1]
    figures: Figures = {}
    for ranks, run in runs.items():
        run["imbalance"], _ = evenness(settings.compose([*scaling.options(ranks), "out=unused"]), ranks)
        run["efficiency"] = run["tokens_per_second"] / ranks / alone["tokens_per_second"]
        if ranks > 1:
            link = scaling.link(ranks, size)
            machines = Machines(ranks, link, link, overlap=accelerator() is not None)
            run |= {"link": asdict(link), **_predicted(cfg, vocabulary, run, alone["tokens_per_second"], machines)}
            if apart:
                together = scaling.apart(ranks)
                run["apart_tokens_per_second"] = together
                busy = _predicted(cfg, vocabulary, run, together / ranks, machines)
                run |= {f"{name}_from_apart": value for name, value in busy.items()}
        figures[str(ranks)] = run
    return figures


def _predicted(cfg: Any, vocabulary: int, run: Figures, rate: float, machines: Machines) -> Figures:
    """Predict a run's step from the tokens a second of one process, and tell the share by which that is wrong."""
    tokens = run["tokens_per_second"] * run["step_seconds"] / run["ranks"]
    work = work_of(cfg, vocabulary, tokens, 1 / rate)
    step = cost_model.step(work, machines, run["ranks"], imbalance=run["imbalance"])
    return {"predicted_seconds": step.seconds, "prediction_error": step.seconds / run["step_seconds"] - 1,
            "predicted": asdict(step)}  # fmt: skip


def goals(figures: Figures) -> list[tuple[str, str, str, str]]:
    """Return what two processes of one core each reach beside one, and the goal."""
    if accelerator() or "2" not in figures:
        return []
    found = figures["2"]["tokens_per_second"] / figures["1"]["tokens_per_second"]
    what = "real tokens a second, 2 processes of one core each, times 1 of one core"
    return [(what, f"{found:.2f}", f"at least {GOAL:.2f}", "met" if found >= GOAL else "missed")]


def measured_lines(figures: Figures) -> str:
    """Return what was measured and predicted, for a reader."""
    head = ("processes", "real tokens/s", "efficiency", "s a step", "predicted", "error", "as many runs apart",
            "error from these")  # fmt: skip
    rows = []
    for ranks, run in figures.items():
        row = [ranks, f"{run['tokens_per_second']:,.0f}", f"{run['efficiency']:.1%}", f"{run['step_seconds']:.3f}"]
        if "predicted_seconds" in run:
            row += [f"{run['predicted_seconds']:.3f}", f"{run['prediction_error']:+.1%}"]
        if "apart_tokens_per_second" in run:
            row += [f"{run['apart_tokens_per_second']:,.0f}", f"{run['prediction_error_from_apart']:+.1%}"]
        rows.append(row + [""] * (len(head) - len(row)))
    return table(head, rows)


def chart(measured: Figures, computed: Figures, path: Path) -> None:
    """Draw efficiency by processes: measured and predicted here, and computed for GPUs, in a picture of its own."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (here, there) = plt.subplots(1, 2, figsize=(9, 3.6), sharey=True, layout="constrained")
    ranks = [int(n) for n in measured]
    here.plot(ranks, [run["efficiency"] for run in measured.values()], "o-", color="#2a6f97", label="measured")
    several = {int(n): run for n, run in measured.items() if "prediction_error" in run}
    predicted = [run["efficiency"] / (1 + run["prediction_error"]) for run in several.values()]
    here.plot(list(several), predicted, "x", color="#c1121f", label="predicted")
    here.set(xlabel="processes", ylabel="tokens a second a process, of one alone", xticks=ranks, title="measured here")
    for case in computed["cases"]:
        name = f"{case['model']}, tensor {case['tensor']}"
        there.plot(list(case["gpus"]), [step["efficiency"] for step in case["gpus"].values()], ".--", label=name)
    there.set_xscale("log", base=2)
    there.set_xticks(GPUS, [str(n) for n in GPUS])
    there.set(xlabel=f"{computed['gpu']['name']} GPUs", title=COMPUTED)
    for axes in (here, there):
        axes.set_ylim(0, 1.05)
        axes.legend(frameon=False)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def arguments() -> argparse.Namespace:
    """Return what the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, metavar="CELLS")
    parser.add_argument("geneformer", type=Path, metavar="GENEFORMER")
    parser.add_argument("settings", nargs="*", metavar="OPTION=VALUE", help="as for `megacell pretrain`")
    parser.add_argument("--ranks", help="processes, from 1 on, such as 1,2,4 (default: up to the GPUs, else the cores)")
    parser.add_argument("--cells", type=int, default=16, help="of each process a step (default: %(default)s)")
    add_protocol(parser)
    parser.add_argument("--no-apart", action="store_true", help="leave out the runs that exchange nothing")
    parser.add_argument("--json", type=Path, metavar="FILE", help="keep the figures here")
    parser.add_argument("--chart", type=Path, metavar="FILE", help="draw them here (.png, .svg)")
    return parser.parse_args()


def numbers_of_ranks(said: str | None) -> list[int]:
    """Return the numbers of processes: as said, or powers of two up to the GPUs or cores; 1 is always one."""
    if said:
        return sorted({1, *map(int, said.split(","))})
    import torch

    most = torch.cuda.device_count() or len(os.sched_getaffinity(0))
    return [2**power for power in range(most.bit_length())]


def main() -> None:
    """Convert, import, measure, compute, print, keep."""
    args = arguments()
    counts = numbers_of_ranks(args.ranks)
    protocol = Protocol(args.warmup, args.steps, args.seconds, args.windows)
    when = where_and_when()
    with tempfile.TemporaryDirectory(prefix="megacell-scaling-") as temporary:
        folder = Path(temporary)
        convert([args.data], folder / "store")
        published_vocabulary(args.geneformer, WITH_NAMES).save(folder / "vocabulary")
        inputs = [f"store={folder}/store", f"vocabulary={folder}/vocabulary"]
        scaling = Scaling([*inputs, *args.settings], folder, args.cells, protocol, max(counts))
        measured = measure(scaling, counts, apart=not args.no_apart and not accelerator())
        computed = many_gpus([*inputs, "out=unused"])
    found = goals(measured)
    figures = {
        **when,
        "load_average_after": os.getloadavg()[0],
        "accelerator": accelerator(),
        "overrides": args.settings,
        "cells_a_process": args.cells,
        "cores_a_process": scaling.cores,
        "protocol": asdict(protocol),
        "goals": [dict(zip(("figure", "found", "goal", "result"), goal, strict=True)) for goal in found],
        "measured": measured,
        "computed": computed,
    }
    where = figures["accelerator"] or when["hardware"]["processor"]
    print(f"{when['date']}, {where}, load {when['load_average_before']:.1f}")
    print(measured_lines(measured))
    if found:
        print(table(("figure", "found", "goal", ""), found))
    print(lines(computed))
    if args.json:
        args.json.write_text(json.dumps(figures, indent=1) + "\n")
    if args.chart:
        chart(measured, computed, args.chart)


if __name__ == "__main__":
    main()
