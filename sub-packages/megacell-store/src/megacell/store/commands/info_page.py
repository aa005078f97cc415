# SPDX-License-Identifier: Apache-2.0
"""`megacell info STORE --html`: a store as one page; other packages add sections to it."""

import argparse
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from megacell.core.report.charts import Axes, bars, histogram
from megacell.core.report.page import Page
from megacell.store.read.cell_store import CellStore

Section = Callable[[Page, CellStore, argparse.Namespace], None]
MOST_BARS = 30
MOST_LABELS = 100  # a column with more values is no label
SAMPLED = 20_000  # cells whose counts are drawn, spread over the store
_BINS = 60


def write_page(store: CellStore, path: Path, sections: list[Section], args: argparse.Namespace) -> None:
    """Write the page of a store to a file; `args` are the command's, for sections of other packages."""
    page = Page(store.path.name, f"A Megacell store of {len(store):,} cells and {store.shape[1]:,} genes")
    page.section("What it holds")
    manifest = store.manifest
    size = sum(record.bytes for _, record in manifest.all_files())
    page.table(
        ("", ""),
        [
            ("cells", len(store)), ("genes", store.shape[1]), ("values above zero", manifest.values),
            ("MiB on disk", round(size / 2**20)), ("shards", len(manifest.shards)), ("generation", manifest.generation),
        ],
    )  # fmt: skip
    page.text(f"Species: {manifest.species}. Digest: {manifest.digest}. Path: {store.path}.", note=True)
    _sources(page, store)
    _labels(page, store)
    _counts(page, store)
    for section in sections:
        section(page, store, args)
    page.write(path)


def most(values: dict[str, float]) -> dict[str, float]:
    """Return the largest values, in falling order, and how many others there are, together."""
    ordered = dict(sorted(values.items(), key=lambda item: -item[1]))
    if len(ordered) <= MOST_BARS:
        return ordered
    kept = dict(list(ordered.items())[: MOST_BARS - 1])
    return {**kept, f"{len(ordered) - len(kept):,} others": sum(ordered.values()) - sum(kept.values())}


def _sources(page: Page, store: CellStore) -> None:
    page.section("Sources")
    cells, genes = ({s.name: float(getattr(s, of)) for s in store.sources} for of in ("cells", "genes"))
    drawn = {"Cells by source": bars("cells by source", most(cells), lambda n: f"{n:,.0f}")}
    if len(genes) <= MOST_BARS:
        drawn["Genes measured by source"] = bars("genes by source", genes, lambda n: f"{n:,.0f}")
    page.figures(drawn)
    head = ("source", "cells", "genes", "matrix", "counts", "ids", "species", "notes")
    page.table(
        head,
        [(s.name, s.cells, s.genes, s.matrix, s.kind, s.ids, s.species, "; ".join(s.notes)) for s in store.sources],
    )


def _labels(page: Page, store: CellStore) -> None:
    drawn = {}
    for column in store.manifest.obs:
        if column.kind not in ("category", "boolean") or len(column.categories or ()) > MOST_LABELS:
            continue
        counts = store.obs_column(column.name).astype(object).value_counts(dropna=False)
        values = {
            "(missing)" if value != value or value is None else str(value): float(n) for value, n in counts.items()
        }
        if len(values) > 1:
            drawn[column.name] = bars(f"cells by {column.name}", most(values), lambda n: f"{n:,.0f}")
    page.section("Labels")
    page.figures(drawn)
    others = [f"{c.name} ({c.kind})" for c in store.manifest.obs if c.name not in drawn]
    if others:
        page.text(f"Not drawn: {', '.join(others)}.", note=True)


def _counts(page: Page, store: CellStore) -> None:
    chosen = np.unique(np.linspace(0, len(store) - 1, min(len(store), SAMPLED)).astype(np.int64))
    totals, genes = np.concatenate([*_totals(store, chosen)], axis=1)
    page.section("Counts")
    figures = [f"{np.median(totals):,.0f} counts", f"{np.median(genes):,.0f} genes"]
    page.text(f"Median of a cell: {' and '.join(figures)}, of {len(chosen):,} cells spread over the store.")
    drawn = {}
    for name, values in (("Counts of a cell", totals), ("Genes seen in a cell", genes)):
        top = float(np.quantile(values, 0.995)) or 1.0  # a few cells would squeeze all others
        cells, edges = np.histogram(values[values <= top], bins=_BINS, range=(0, top))
        drawn[f"{name} (without the highest 0.5 %)"] = histogram(
            name.lower(), cells.tolist(), edges.tolist(), Axes(name.lower(), "cells")
        )
    page.figures(drawn)


def _totals(store: CellStore, chosen: np.ndarray[Any, Any]) -> Iterator[np.ndarray[Any, Any]]:
    for part in np.array_split(chosen, -(-len(chosen) // 2048)):
        rows = store.rows(part)
        yield np.stack([np.asarray(rows.sum(1), np.float64).ravel(), np.diff(rows.indptr).astype(np.float64)])
