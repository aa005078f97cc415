# SPDX-License-Identifier: Apache-2.0
"""What `megacell bench train` found, as a table and as a chart."""

from pathlib import Path
from typing import Any

from megacell.core.cli.parsers import table as columns

HEAD = (
    "", "real tokens/s", "a process", "cells/s", "padded tokens/s", "real", "wait", "GiB", "MFU", "not engine",
    "a process of megacell's is",
)  # fmt: skip


def table(figures: dict[str, Any]) -> str:
    """Return the figures as lines for a reader."""
    where = figures["accelerator"] or f"{figures['hardware']['processor']}, {figures['hardware']['cores']} cores"
    peak = figures["peak_flops"]
    lines = [
        f"{figures['date']}, {where}, " + ", ".join(f"{name} {v}" for name, v in figures["versions"].items()),
        f"megacell in {figures['settings']['devices']} process(es), tokens a cell (quartiles) "
        + " ".join(str(n) for n in figures["tokens_a_cell"].values()),
        f"{figures['required_flops_a_token'] / 1e6:,.1f} MFLOPs a real token ({figures['flops_convention']}); "
        + (f"MFU of {peak / 1e12:,.0f} TFLOP/s, dense, 16 bits" if peak else "no peak is known: no MFU"),
        columns(HEAD, [_row(name, each, figures["times"].get(name)) for name, each in figures["contenders"].items()]),
    ]
    return "\n".join(lines)


def _row(name: str, each: dict[str, Any], times: dict[str, float] | None) -> tuple[str, ...]:
    return (
        name,
        f"{each['tokens_per_second']:,.0f}",
        f"{each['tokens_per_second_a_rank']:,.0f}",
        f"{each['cells_per_second']:,.1f}",
        f"{each['padded_tokens_per_second']:,.0f}",
        f"{each['real_of_computed']:.0%}",
        f"{each['data_wait']:.1%}",
        f"{each['memory_gib']:.1f}",
        f"{each['mfu']:.1%}" if "mfu" in each else "",
        f"{each['outside_the_engine']:.1%}" if "outside_the_engine" in each else "",
        ", ".join(f"{ratio:.1f} x in {precision}" for precision, ratio in (times or {}).items()),
    )


def chart(figures: dict[str, Any], path: Path) -> None:
    """Draw the contenders' real tokens a second as bars."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    own = figures["contenders"]
    names, rates = list(own), [each["tokens_per_second"] for each in own.values()]
    figure, axes = plt.subplots(figsize=(7, 0.6 + 0.5 * len(names)), layout="constrained")
    bars = axes.barh(names, rates, color=["#2a6f97" if e["name"] == "megacell" else "#b0b7bf" for e in own.values()])
    axes.bar_label(bars, [f"{rate:,.0f}" for rate in rates], padding=3)
    axes.invert_yaxis()
    axes.margins(x=0.15)
    axes.set_xlabel("real tokens a second")
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    figure.savefig(path, dpi=150)
    plt.close(figure)
