# SPDX-License-Identifier: Apache-2.0
"""What the cost model says of up to 512 GPUs: nothing is measured, every figure rests on what is printed with it."""

from dataclasses import asdict, dataclass
from typing import Any

import cost_model
import numpy as np
from cost_model import Link, Machines, Work

from megacell.core.cli.parsers import table
from megacell.geneformer.bench.train import PEAKS, flops_a_token, token_counts
from megacell.geneformer.pretraining.settings import model_config
from megacell.store.sampling.sharing import share_out
from megacell.training.config import settings

GPUS = tuple(2**power for power in range(10))
COMPUTED = "computed, on assumptions; not measured"
CELLS, BUDGET = 64, 32_768  # of one copy a step, and tokens of a micro-batch
STEPS = 20  # whose imbalance is taken
REACHED = 0.8  # of the links' bandwidth


@dataclass(frozen=True)
class Gpu:
    """A GPU and its links, as their vendor states them: FLOP/s, and bytes a second in one direction."""

    name: str
    peak: float
    nvlink: float
    infiniband: float

    def machines(self) -> Machines:
        """Return machines of eight, whose links reach a part of what is stated."""
        inside, between = Link(REACHED * self.nvlink, 2e-6), Link(REACHED * self.infiniband, 5e-6)
        return Machines(8, inside, between, overlap=True)


H100 = Gpu("H100", PEAKS["H100"] * 1e12, nvlink=450e9, infiniband=50e9)
CASES = (  # model, tensor parallel ranks, share of the peak that one GPU alone is assumed to reach
    ("geneformer_10m", 1, 0.23),
    ("geneformer_106m", 1, 0.40),
    ("geneformer_1b", 1, 0.40),
    ("geneformer_1b", 2, 0.40),
)


def many_gpus(given: list[str], gpu: Gpu = H100) -> dict[str, Any]:
    """Compute the steps of `CASES` on `GPUS`.

    Parameters
    ----------
    given : list of str
        ``store=…``, ``vocabulary=…`` and ``out=…``: the cells whose lengths count.
    gpu : Gpu

    Returns
    -------
    dict
        In JSON's types: what was assumed, and for each case its figures by GPUs.
    """
    machines, cases = gpu.machines(), []
    counted: dict[int, tuple[np.ndarray, int]] = {}
    for model, tensor, share in CASES:
        cfg = settings.compose([*given, f"model={model}", "precision=bf16", f"batch.tokens={BUDGET}"])
        if (longest := cfg.model.max_length) not in counted:
            counted[longest] = token_counts(cfg)
        lengths, vocabulary = counted[longest]
        flops = flops_a_token(cfg, lengths, vocabulary)
        work = work_of(cfg, vocabulary, CELLS * float(lengths.mean()), flops / (share * gpu.peak))
        steps = {}
        for gpus in (n for n in GPUS if n % tensor == 0):
            copies = gpus // tensor
            found = cost_model.step(work, machines, gpus, tensor=tensor, imbalance=imbalance(lengths, copies))
            steps[gpus] = {
                **asdict(found),
                "seconds": found.seconds,
                "efficiency": cost_model.efficiency(work, found, tensor),
                "tokens_per_second": copies * work.tokens / found.seconds,
            }
        case = {"model": model, "tensor": tensor, "assumed_share_of_peak": share, "flops_a_token": flops}
        cases.append({**case, "work": asdict(work), "gpus": steps})
    return {
        "kind": COMPUTED,
        "assumptions": [*cost_model.ASSUMPTIONS, *_assumed(gpu, machines)],
        "gpu": asdict(gpu),
        "machines": asdict(machines),
        "cases": cases,
    }


def imbalance(lengths: np.ndarray, copies: int) -> float:
    """Return by which share the fullest copy's tokens exceed the mean, over a few steps of cells drawn at random."""
    rng, shares = np.random.default_rng(0), []
    for _ in range(STEPS):
        drawn = rng.choice(lengths, CELLS * copies)
        load = np.bincount(share_out(drawn, copies), weights=drawn, minlength=copies)
        shares.append(load.max() / load.mean() - 1)
    return float(np.mean(shares))


def work_of(cfg: Any, vocabulary: int, tokens: float, seconds_a_token: float) -> Work:
    """Return the work of one copy a step: ``tokens`` of it, at the speed of one rank alone."""
    return Work(
        tokens=tokens,
        micro_batches=-(-round(tokens) // cfg.batch.tokens),
        seconds_a_token=seconds_a_token,
        parameters=parameters(cfg, vocabulary),
        layers=cfg.model.layers,
        hidden=cfg.model.hidden,
        weight_bytes=4 if cfg.precision == "fp32" else 2,
    )


def parameters(cfg: Any, vocabulary: int) -> int:
    """Return the number of parameters, of the padded vocabulary's network as it is trained."""
    import torch

    from megacell.geneformer.model.bert import PackedBert
    from megacell.training.distributed import device
    from megacell.training.nn.layout import Layout

    with device.single_process(), torch.device("meta"):
        network = PackedBert(model_config(cfg, vocabulary), Layout())
    return sum(parameter.numel() for parameter in network.parameters())


def _assumed(gpu: Gpu, machines: Machines) -> list[str]:
    return [
        f"{gpu.name}: {gpu.peak / 1e12:,.0f} TFLOP/s, dense, 16 bits; NVLink {gpu.nvlink / 1e9:,.0f} GB/s and "
        f"InfiniBand {gpu.infiniband / 1e9:,.0f} GB/s a GPU in one direction, of which rings reach {REACHED:.0%}; "
        f"{machines.inside.latency * 1e6:g} and {machines.between.latency * 1e6:g} µs a hop; {machines.ranks} GPUs a "
        "machine",
        "one GPU alone reaches the share of its peak that stands beside each model: assumed, not measured",
        f"bf16, {CELLS} cells a copy a step in micro-batches of {BUDGET:,} tokens; lengths of the cells given here; "
        "FLOPs as `megacell bench train` counts them",
    ]


def lines(figures: dict[str, Any]) -> str:
    """Return assumptions and figures for a reader."""
    assumed = "\n".join(f"  - {text}" for text in figures["assumptions"])
    names = [f"{case['model']}, tensor {case['tensor']}" for case in figures["cases"]]
    rows = [(str(n), *(_cell(case["gpus"].get(n)) for case in figures["cases"])) for n in GPUS]
    shares = ("assumed of peak", *(f"{case['assumed_share_of_peak']:.0%}" for case in figures["cases"]))
    head = f"To {GPUS[-1]} GPUs: {figures['kind']}. Efficiency, and milliseconds a step:"
    return f"{head}\n{table(('GPUs', *names), [shares, *rows])}\nAssumed:\n{assumed}"


def _cell(found: dict[str, float] | None) -> str:
    return f"{found['efficiency']:.1%}, {1000 * found['seconds']:,.1f} ms" if found else ""
