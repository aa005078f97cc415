# SPDX-License-Identifier: Apache-2.0
"""`megacell report`: a run as one page, out of what the run has left in its folder, and of its store where it is."""

import csv
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from megacell.core.errors import DataError, UsageError
from megacell.core.files import write_whole
from megacell.core.report.charts import Axes, Line, histogram, lines
from megacell.core.report.page import Page
from megacell.core.versions import installed_version
from megacell.geneformer.model.provenance import check_facts
from megacell.geneformer.report.coverage import coverage_section
from megacell.geneformer.report.umap import umap_section
from megacell.geneformer.tokens.lengths import token_lengths
from megacell.geneformer.vocabulary.vocabulary import Vocabulary
from megacell.store import CellStore
from megacell.store.sampling.split import Split, SplitSettings, split_cells
from megacell.training.config.settings import SAVED, read_saved
from megacell.training.foreign.plain import check_shape, read_json

EVALUATION = "evaluation.json"
_OPTIONS = {"store": str, "steps": int, "model": {"max_length": int}}  # what is taken of a run's files, and its types
_SUMMARY = {"step?": int, "finished?": bool, "*": int | float}
_EVALUATION = {"step": int, "split": str, "rows": [{"group": str, "cells": int, "masked_genes": int}]}
_BASELINES = {"frequency": "gene frequency", "rank_frequency": "frequency at that rank"}
_PREDICTORS = {"model": "this model", **_BASELINES, "count_arithmetic": "count arithmetic (no network)"}
_CURVES = {  # column of metrics.csv: caption, axis, what the axis reaches at least
    "lr": ("Learning rate", "learning rate", None),
    "grad_norm": ("Gradient norm, before clipping", "norm", None),
    "tokens_per_second": ("Speed, all ranks", "real tokens/s", None),
    "data_wait": ("Share of the time that data were waited for", "share", 0.1),
    "memory_gib": ("Peak memory of rank 0", "GiB", None),
}


@dataclass
class RunFolder:
    """What a run has left so far; absent where it has not come to it."""

    path: Path
    options: dict[str, Any]
    rows: list[dict[str, float]]
    summary: dict[str, Any]
    facts: dict[str, Any]
    evaluation: dict[str, Any]
    vocabulary: Vocabulary
    lines: list[str] = field(default_factory=list)

    @classmethod
    def open(cls, path: Path) -> "RunFolder":
        """Read it.

        Raises
        ------
        UsageError, DataError
            If it is no run folder, or a file in it is broken.
        """
        from megacell.training.checkpoint import checkpoint

        if not (path / SAVED).is_file():
            raise UsageError(f"{path}: no run folder ({SAVED} is missing)")
        options = read_saved(path)
        try:
            check_shape(options, _OPTIONS)
        except ValueError as error:
            raise DataError(f"{path / SAVED}: not the options of a run ({error})") from None
        newest, told = checkpoint.newest(path / "checkpoints") if (path / "checkpoints").is_dir() else (None, [])
        facts = checkpoint.read_facts(newest) if newest else {}
        if newest:
            check_facts(facts, str(newest))
        return cls(
            path, options, _metrics(path / "metrics.csv"), _json(path / "summary.json", _SUMMARY), facts,
            _json(path / EVALUATION, _EVALUATION), Vocabulary.open(path / "vocabulary"), told,
        )  # fmt: skip

    def curve(self, column: str) -> list[tuple[float, float]]:
        """Return a column of metrics.csv by step."""
        return [(row["step"], row[column]) for row in self.rows if "step" in row and column in row]

    @property
    def step(self) -> int:
        """Steps done, as far as is known."""
        return int(max([self.summary.get("step", 0), *(row.get("step", 0) for row in self.rows)]))


def _metrics(path: Path) -> list[dict[str, float]]:
    if not path.is_file():
        return []
    with open(path, newline="", encoding="utf-8") as file:
        try:
            return [{k: float(v) for k, v in row.items() if v} for row in csv.DictReader(file)]
        except (ValueError, TypeError, csv.Error) as error:
            raise DataError(f"{path}: a row that is no numbers ({error}); mend or remove the row") from error


def _json(path: Path, shape: dict[str, Any]) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        found: dict[str, Any] = read_json(path)
        check_shape(found, shape)
        return found
    except ValueError as error:
        raise DataError(f"{path}: broken ({error}); remove it") from error


def report(
    run: Path, out: Path, *, store: Path | None, embedded: Path | None, by: str | None, evaluate_first: bool
) -> Iterator[str]:
    """Write the page of a run; yield what a user should know of what it lacks.

    Parameters
    ----------
    run : Path
        The run folder.
    out : Path
        The file to write, or to write anew.
    store : Path, optional
        Where the store is now; without, where it was.
    embedded : Path, optional
        What `megacell embed` made of the store; without, embedded.h5ad in the run folder if it is there.
    by : str, optional
        obs column by which cells are coloured.
    evaluate_first : bool
        Evaluate the model, and keep the result in the run folder.

    Raises
    ------
    UsageError, DataError
        For what is no run, a store of other cells than the run's, an unknown column.
    """
    folder = RunFolder.open(run)
    yield from folder.lines
    cells, reason = _store(folder, store)
    if evaluate_first:
        _evaluate(folder, cells, reason)
    embedded = embedded or (run / "embedded.h5ad" if (run / "embedded.h5ad").is_file() else None)
    page = Page(_title(folder), _about(folder))
    page.facts(_facts(folder))
    _results(page, folder)
    _curves(page, folder)
    if cells is None:
        page.section("Cells")
        page.text(f"Not shown: {reason}.")
        yield f"without cells: {reason}"
    else:
        split = split_cells(cells, SplitSettings(**folder.facts["data"]["split"])) if folder.facts else None
        _cells(page, folder, cells, split)
        if embedded is not None:
            umap_section(page, cells, split, embedded, by)
        else:
            yield f"without a UMAP: no cells embedded yet; megacell embed {run} {cells.path} --out {run}/embedded.h5ad"
    if not folder.evaluation:
        yield "without count arithmetic: not evaluated yet; --evaluate does it"
    _environment(page, folder)
    page.write(out)


def _store(folder: RunFolder, given: Path | None) -> tuple[CellStore | None, str]:
    """Open the run's store; return why it is not there."""
    path = given or Path(folder.options["store"])
    if given is None and not (path / "manifest.json").is_file():
        return None, f"the store is no longer at {path}, or holds tokens; --store names where it is"
    store = CellStore.open(path)
    if folder.facts and folder.facts["store"]["digest"] != store.digest:
        if given is not None:
            raise DataError(f"{path}: not the store that the run was trained on, or files were appended to it since")
        return None, f"files were appended to {path} since"
    return store, ""


def _evaluate(folder: RunFolder, store: CellStore | None, reason: str) -> None:
    if store is None:
        raise UsageError(f"--evaluate needs the store: {reason}")
    from megacell.geneformer.evaluation.evaluate import evaluate
    from megacell.training.distributed import device

    device.quiet()
    text = evaluate(folder.path, store.path).to_json()
    write_whole(folder.path / EVALUATION, json.dumps({"step": folder.facts["step"], **json.loads(text)}).encode())
    folder.evaluation = _json(folder.path / EVALUATION, _EVALUATION)


def _title(folder: RunFolder) -> str:
    """Return which run it is, of which model, on which data."""
    model = folder.options["model"]
    name = f"{model['layers']} layers of {model['hidden']}"
    return f"{folder.path.resolve().name}: a Geneformer of {name}, on {Path(folder.options['store']).name}"


def _facts(folder: RunFolder) -> list[tuple[str, str, str]]:
    """Return held-out loss beside the baselines, speed, cells, steps and time, as far as they are known."""
    facts = []
    if held_out := folder.curve("held_out_loss"):
        known = {name: folder.summary[key] for key, name in _BASELINES.items() if key in folder.summary}
        if folder.evaluation and (arithmetic := folder.evaluation["rows"][0]["count_arithmetic"]):
            known["count arithmetic"] = arithmetic[0]
        beside = ", ".join(f"{name} {value:.3f}" for name, value in known.items())
        facts.append(("held-out loss", f"{held_out[-1][1]:.3f} nats", beside or "no baseline yet"))
    timed = [row for row in folder.rows if row.get("tokens_per_second")]
    if timed:
        seconds = sum(row.get("tokens", 0) / row["tokens_per_second"] for row in timed)
        rate = np.median([row["tokens_per_second"] for row in timed[1:] or timed])
        facts.append(
            ("speed", f"{rate:,.0f} tokens/s", f"{sum(row.get('tokens', 0) for row in timed):,.0f} tokens in all")
        )
        facts.append(("time of training", _duration(seconds), "without validation and saving"))
        facts.append(("cells seen", f"{sum(row.get('cells', 0) for row in timed):,.0f}", ""))
    state = "finished" if folder.summary.get("finished") else "not finished"
    facts.append(("steps", f"{folder.step:,} of {folder.options['steps']:,}", state))
    return facts


def _duration(seconds: float) -> str:
    """Return a time in the unit that it is best told in."""
    for unit, size in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} seconds"


def _about(folder: RunFolder) -> str:
    when = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    return f"A training of Megacell. Page made {when} by Megacell {installed_version()}."


def _results(page: Page, folder: RunFolder) -> None:
    page.section("Held-out loss")
    held_out = folder.curve("held_out_loss")
    rows: list[tuple[str, str]] = []
    if folder.evaluation:
        found = folder.evaluation["rows"][0]
        page.text(
            f"Nats a masked gene over {found['masked_genes']:,} genes of {found['cells']:,} held-out cells, "
            f"± standard error over cells; at step {folder.evaluation['step']:,}. {folder.evaluation['split']}."
        )
        rows = [(name, _nats(found[key])) for key, name in _PREDICTORS.items()]
    elif held_out:
        rows = [("this model", f"{held_out[-1][1]:.3f}")]
        rows += [(name, f"{folder.summary[key]:.3f}") for key, name in _BASELINES.items() if key in folder.summary]
        rows.append((_PREDICTORS["count_arithmetic"], "not computed (--evaluate)"))
        page.text(f"Nats a masked gene, as the run itself measured them at step {held_out[-1][0]:,.0f}.")
    else:
        page.text("No validation yet.")
        return
    page.table(("predictor", "nats"), rows)
    page.text(
        "Lower is better. A model that does not beat count arithmetic has learned little that the order of genes does "
        "not give away; rest no claim about biology on a loss alone.", note=True
    )  # fmt: skip


def _nats(value: tuple[float, float] | None) -> str:
    return "not defined" if value is None else f"{value[0]:.3f} ± {value[1]:.3f}"


def _curves(page: Page, folder: RunFolder) -> None:
    page.section("The run")
    references = {name: folder.summary[key] for key, name in _BASELINES.items() if key in folder.summary}
    loss = [Line("training", folder.curve("loss")), Line("held out", folder.curve("held_out_loss"), dots=True)]
    drawn = {"Loss at masked genes": lines("loss", loss, Axes("step", "nats", references))}
    if folder.evaluation and (arithmetic := folder.evaluation["rows"][0]["count_arithmetic"]):
        references = {**references, "count arithmetic": arithmetic[0]}
        drawn["The same beside count arithmetic"] = lines("loss", loss, Axes("step", "nats", references))
    for column, (caption, axis, reach) in _CURVES.items():
        axes = Axes("step", axis, from_zero=True, reach=reach)
        drawn[caption] = lines(caption, [Line(caption, folder.curve(column))], axes)
    page.figures(drawn)
    tokens = sum(row.get("tokens", 0.0) for row in folder.rows)
    rates = [row["tokens_per_second"] for row in folder.rows[1:] if "tokens_per_second" in row]
    if rates:
        page.text(
            f"{tokens:,.0f} real tokens seen; median speed {np.median(rates):,.0f} tokens/s, the first row left out."
        )


def _cells(page: Page, folder: RunFolder, store: CellStore, split: Split | None) -> None:
    page.section("Cells")
    if split is not None:
        page.text(f"{split.line}.")
    lengths = token_lengths(store, folder.vocabulary)
    around = len(folder.vocabulary.prefix) + len(folder.vocabulary.suffix)
    longest = int(folder.options["model"]["max_length"])
    tokens = np.where(lengths > 0, lengths.astype(np.int64) + around, 0)
    found, edges = np.histogram(tokens, bins=60, range=(0, max(tokens.max(), 1)))
    cut = float((tokens > longest).mean())
    caption = f"Tokens of a cell; cut at {longest:,} (dashed): {cut:.1%} of the cells"
    drawn = histogram(
        "tokens of a cell", found.tolist(), edges.tolist(), Axes("tokens, before the cut", "cells"), longest
    )
    page.figures({caption: drawn})
    coverage_section(page, store, [folder.vocabulary])


def _environment(page: Page, folder: RunFolder) -> None:
    page.section("Environment")
    facts = folder.facts
    rows = [(name, str(value)) for name, value in facts.get("versions", {}).items()]
    if facts:
        ranks, store = facts["ranks"], facts["store"]
        rows += [
            ("ranks", f"{ranks['world']}, of them {ranks['tensor']} to a copy of the model"),
            ("precision", facts["precision"]),
            ("store", f"{folder.options['store']}, {store['cells']:,} cells, digest {store['digest']}"),
        ]
    rows.append(("vocabulary", f"{folder.vocabulary.name}, sha256 {folder.vocabulary.hash}"))
    page.table(("", ""), rows)
    readme = folder.path / "README.md"
    if readme.is_file() and (
        started := readme.read_text(encoding="utf-8").partition("## When it was started")[2].strip()
    ):
        page.section("When it was started")
        page.block(started)
    page.section("Options")
    page.block((folder.path / SAVED).read_text(encoding="utf-8"))
