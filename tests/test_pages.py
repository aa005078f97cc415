# SPDX-License-Identifier: Apache-2.0
"""The pages of runs and stores: well-formed, needing nothing from elsewhere, and showing what the files say."""

import csv
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import anndata as ad
import numpy as np
import pytest
from runs import here, metrics, one_line

from megacell.core.report.charts import Axes, Line, bars, lines, number, points, ticks
from megacell.store import CellStore

VOID = {"meta", "br"}
LOADING = {
    "script",
    "link",
    "img",
    "iframe",
    "object",
    "embed",
    "audio",
    "video",
    "source",
    "base",
    "form",
    "use",
    "image",
}


class Reader(HTMLParser):
    """Reads a page, asserting that each element is closed in its turn."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open, self.tags, self.attributes, self.texts = [], [], [], []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)

    @property
    def text(self) -> str:
        return " ".join(self.texts)


def read(path: Path) -> Reader:
    """Read a page, and see that nothing in it could be fetched or run."""
    content = path.read_text(encoding="utf-8")
    page = Reader(content)
    assert not LOADING & set(page.tags)
    assert not [
        name for name, _ in page.attributes if name in ("src", "href", "xlink:href", "srcset") or name[:2] == "on"
    ]
    (style,) = re.findall(r"<style>(.*?)</style>", content, re.DOTALL)
    assert not re.search(r"url\(|@import|https?:", style)
    assert not re.search(r"https?:|//[a-z]", " ".join(value or "" for _, value in page.attributes))
    return page


# the drawing


@pytest.mark.parametrize(
    ("low", "high", "found"),
    [(0, 10, [0, 2, 4, 6, 8, 10]), (0.13, 0.41, [0.2, 0.3, 0.4]), (3, 3, [3]), (0, 1e-6, None)],
)
def test_ticks_are_round_numbers_within_the_axis(low, high, found):
    got = ticks(low, high)
    assert all(low <= value <= high for value in got)
    assert len(got) <= 7
    if found is not None:
        assert got == pytest.approx(found)


def test_numbers_on_an_axis_are_short():
    assert [number(v) for v in (0, 0.25, 1500, 25_000, 3e6, 2e9, 3e-5)] == [
        "0",
        "0.25",
        "1500",
        "25k",
        "3M",
        "2G",
        "3.0e-05",
    ]


def test_a_long_line_still_shows_its_peaks():
    path = [(float(i), 0.0) for i in range(100_000)]
    path[77_777] = (77_777.0, 5.0)
    svg = lines("x", [Line("a", path)], Axes("step", "y"))
    heights = [float(y) for y in re.findall(r"[ML]?[\d.]+ ([\d.]+)", re.search(r'stroke="#0072b2" d="M(.*?)"', svg)[1])]
    assert len(heights) < 2000
    assert min(heights) < max(heights) - 150


def test_the_pointer_finds_values_of_a_line_and_labels_of_bars_are_whole():
    svg = lines("x", [Line("loss", [(float(i), i / 7) for i in range(5000)])], Axes("step", "nats"))
    told = re.findall(r"<title>loss: ([\d.]+) at step (\d+)</title>", svg)
    assert 100 <= len(told) <= 200
    name = "alveolar type 2 epithelial cell"
    svg = bars("kinds", {name: 3.0}, lambda n: f"{n:.0f} cells")
    assert f"<title>{name}: 3 cells</title>" in svg
    (at,) = re.findall(rf'<text x="(\d+)" y="\d+" text-anchor="end">{name}</text>', svg)
    assert int(at) >= 6.2 * len(name)


def test_values_that_are_no_numbers_are_left_out_of_a_line():
    svg = lines("x", [Line("a", [(1.0, float("nan")), (2.0, 3.0), (3.0, float("inf")), (4.0, 1.0)])], Axes("step", "y"))
    assert "nan" not in svg
    assert "inf" not in svg
    assert lines("x", [Line("a", [(1.0, float("nan"))])], Axes("step", "y")) == ""


def test_texts_from_files_are_no_html():
    svg = bars("<b>", {"</svg><script>alert(1)</script>": 3.0}, lambda n: f"{n:.0f}")
    svg += points('"', np.array([[0.0, 1.0], [1.0, 0.0]]), ["<i>", "&"])
    assert set(Reader(svg).tags) <= {"svg", "text", "rect", "g", "circle", "ul", "li", "path", "title"}


# the page of a store


@pytest.fixture(scope="module")
def store_page(store, vocabulary, made) -> Reader:
    out = made / "store.html"
    code, told, err = here("info", store, "--html", out, "--vocabulary", vocabulary)
    assert (code, err) == (0, "")
    assert str(out) in told
    return read(out)


def test_a_store_s_page_shows_sources_labels_counts_and_coverage(store_page, store):
    cells = CellStore.open(store)
    assert f"{len(cells):,}" in store_page.texts
    for source in cells.sources:
        assert store_page.texts.count(source.name) >= 2, "in the table and in a chart"
    labels = cells.obs_column("cell_type")
    assert f"{int((labels == 'MNP').sum()):,}" in store_page.texts
    assert "(missing)" in store_page.texts
    totals = np.asarray(cells.rows(np.arange(len(cells))).sum(1)).ravel()
    assert f"{np.median(totals):,.0f} counts" in store_page.text
    assert "100.0%" in store_page.texts, "all together measure the whole vocabulary that was made of them"


def test_a_store_s_page_goes_into_a_folder_that_is_there(store, tmp_path):
    code, _, err = here("info", store, "--html", tmp_path / "none" / "x.html")
    assert code == 2
    one_line(err, "no folder")


# the page of a run


@pytest.fixture(scope="module")
def run(store, vocabulary, tmp_path_factory) -> Path:
    """A run folder as training leaves it, but for its checkpoints: made up, so that nothing has to be trained."""
    folder = tmp_path_factory.mktemp("report") / "a <run>"
    folder.mkdir()
    shutil.copytree(vocabulary, folder / "vocabulary")
    code, options, _ = here("pretrain", "--cfg", f"store={store}", f"vocabulary={vocabulary}", "out=run", "steps=40")
    assert code == 0
    (folder / "config.yaml").write_text(options)
    names = (
        "step",
        "loss",
        "grad_norm",
        "lr",
        "tokens_per_second",
        "data_wait",
        "memory_gib",
        "tokens",
        "held_out_loss",
    )
    with open(folder / "metrics.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        for step in range(10, 41, 10):
            row = dict(zip(names, (step, 9 - step / 10, 1.5, 1e-3, 5000.0 + step, 0.01, 1.2, 1000, ""), strict=True))
            writer.writerow({**row, "held_out_loss": 8.75 - step / 10} if step % 20 == 0 else row)
    summary = {"step": 40, "finished": True, "frequency": 8.691, "rank_frequency": 8.602, "masked_genes": 100}
    (folder / "summary.json").write_text(json.dumps(summary))
    return folder


def write_report(run: Path, *words: object) -> tuple[Reader, str]:
    code, told, err = here("report", run, *words)
    assert (code, err) == (0, ""), err
    return read(run / "report.html"), told


def test_a_run_s_page_shows_its_curves_and_the_baselines(run):
    page, told = write_report(run)
    assert any(text.startswith("a <run>: a Geneformer of ") for text in page.texts)
    assert "4.750 nats" in page.texts
    assert "gene frequency 8.691, frequency at that rank 8.602" in page.texts
    assert "4.750" in page.texts, "the last held-out loss"
    assert {"8.691", "8.602"} <= set(page.texts)
    assert "gene frequency: 8.691" in page.texts, "beside the curve"
    assert "not computed (--evaluate)" in page.texts
    captions = ["Loss at masked genes", "Learning rate", "Gradient norm, before clipping", "Speed, all ranks"]
    assert set(captions) <= set(page.texts)
    assert "4,000 real tokens seen; median speed 5,030 tokens/s" in page.text
    assert "40 of 40 finished" in page.text
    assert (run / "config.yaml").read_text().strip() in "".join(page.texts)
    assert "--evaluate does it" in told


def test_an_evaluation_that_is_there_is_shown(run):
    row = {"group": "all", "cells": 50, "masked_genes": 900, "model": [5.0, 0.1], "frequency": [8.6, 0.1],
           "rank_frequency": [8.5, 0.1], "count_arithmetic": [3.9, 0.05]}  # fmt: skip
    (run / "evaluation.json").write_text(json.dumps({"step": 40, "split": "by cell", "rows": [row]}))
    try:
        page, told = write_report(run)
    finally:
        (run / "evaluation.json").unlink()
    assert {"5.000 ± 0.100", "3.900 ± 0.050", "count arithmetic: 3.900"} <= set(page.texts)
    assert "--evaluate" not in told


def test_a_run_s_page_shows_lengths_and_coverage_of_its_store(run, store):
    page, _ = write_report(run)
    assert any(text.startswith("Tokens of a cell; cut at") for text in page.texts)
    assert "100.0%" in page.texts
    elsewhere = run / "config.yaml"
    before = elsewhere.read_text()
    try:
        elsewhere.write_text(before.replace(str(store), "/no/such/store"))
        page, told = write_report(run)
        assert "--store names where it is" in told
        assert not any(text.startswith("Tokens of a cell") for text in page.texts)
        page, _ = write_report(run, "--store", store)
        assert any(text.startswith("Tokens of a cell") for text in page.texts)
    finally:
        elsewhere.write_text(before)


def test_embedded_cells_are_shown_by_their_labels(run, store, tmp_path):
    cells = CellStore.open(store)
    draw = np.random.default_rng(0).normal(size=(len(cells), 8)).astype(np.float32)
    draw[300:] = np.nan  # cells without a gene of the vocabulary
    ad.AnnData(obsm={"X_megacell": draw}, shape=draw.shape).write_h5ad(tmp_path / "e.h5ad")
    page, _ = write_report(run, "--embedded", tmp_path / "e.h5ad", "--by", "cell_type")
    assert "UMAP of 300 all cells by cell_type" in page.texts, "which are held out stands in a checkpoint; here is none"
    kept = cells.obs_column("cell_type").astype("string").fillna("(missing)")[:300].value_counts()
    assert {f"{name} ({count:,})" for name, count in kept.items()} <= set(page.texts)
    code, _, err = here("report", run, "--embedded", tmp_path / "e.h5ad", "--by", "tissue")
    assert code == 2
    one_line(err, "--by tissue", "cell_type")
    ad.AnnData(obsm={"X_megacell": draw[:9]}, shape=(9, 8)).write_h5ad(tmp_path / "few.h5ad")
    code, _, err = here("report", run, "--embedded", tmp_path / "few.h5ad")
    assert code == 1
    one_line(err, "not the embeddings")


def test_what_is_no_run_is_refused(tmp_path):
    code, _, err = here("report", tmp_path)
    assert code == 2
    one_line(err, "no run folder")


def test_a_run_that_has_only_begun_has_a_page(run, tmp_path):
    begun = tmp_path / "begun"
    begun.mkdir()
    shutil.copytree(run / "vocabulary", begun / "vocabulary")
    shutil.copy(run / "config.yaml", begun)
    page, _ = write_report(begun)
    assert "No validation yet." in page.texts
    assert "0 of 40 not finished" in page.text


@pytest.mark.exhaustive
def test_the_page_of_a_real_run_is_whole(copies, store, tmp_path):
    trained, _ = copies
    out = tmp_path / "run.html"
    code, _, err = here("embed", trained, store, "--out", tmp_path / "e.h5ad")
    assert code == 0, err
    code, told, err = here(
        "report", trained, "--evaluate", "--embedded", tmp_path / "e.h5ad", "--by", "cell_type", "--out", out
    )
    assert code == 0, err
    page = read(out)
    assert any("held-out cells by cell_type" in text for text in page.texts)
    assert any(text.startswith("count arithmetic: ") for text in page.texts)
    assert f"{float([row for row in metrics(trained) if row['held_out_loss']][-1]['held_out_loss']):.1f}" in page.text
    assert "without" not in told


@pytest.mark.exhaustive
@pytest.mark.skipif(not shutil.which("chromium"), reason="no chromium here")
def test_a_browser_shows_and_prints_a_page(store_page, made, tmp_path):
    quiet = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]
    quiet += ["--disable-component-update", "--disable-sync", f"--user-data-dir={tmp_path / 'profile'}"]
    for option in (f"--screenshot={tmp_path / 'page.png'}", f"--print-to-pdf={tmp_path / 'page.pdf'}"):
        subprocess.run(["chromium", *quiet, option, f"file://{made / 'store.html'}"], check=True, capture_output=True)
    assert (tmp_path / "page.png").stat().st_size > 20_000
    assert (tmp_path / "page.pdf").read_bytes().startswith(b"%PDF")
