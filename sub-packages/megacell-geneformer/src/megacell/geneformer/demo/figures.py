# SPDX-License-Identifier: Apache-2.0
"""What the demo shows at its end: a table beside honest baselines, a loss curve and a UMAP."""

import csv
import json
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

from megacell.geneformer.embedding.embedder import Embedder
from megacell.geneformer.embedding.files import KEY
from megacell.geneformer.embedding.inputs import ROWS_AT_ONCE
from megacell.geneformer.evaluation.evaluate import evaluate
from megacell.geneformer.interchange.open import open_model
from megacell.store import CellStore
from megacell.store.sampling.split import SplitSettings, split_cells

matplotlib.use("Agg")
COMPONENTS = 50  # of the principal component analysis
BOOTSTRAPS = 200  # resamplings of the held-out cells, for the standard error of macro-F1


@dataclass
class Cells:
    """The demo's cells as three representations, their labels, and who was held out.

    Attributes
    ----------
    representations : dict of float [cells, …]
        The trained model's embedding, the untrained one's, and PCA of log counts (fitted on training cells).
    labels : object [cells] or None
        None where the store has no such column.
    """

    representations: dict[str, np.ndarray]
    labels: np.ndarray | None
    train: np.ndarray
    held_out: np.ndarray

    @classmethod
    def of(cls, store: CellStore, run: Path, model: Path, embedded: Path, label: str) -> "Cells":
        """Read, embed with an untrained twin, and reduce."""
        import anndata as ad

        trained = open_model(model)
        split = split_cells(store, SplitSettings(**trained.cfg.provenance.data.split))
        embedding = ad.read_h5ad(embedded).obsm[KEY]
        known = ~np.isnan(embedding).any(1)
        representations = {
            "this model": embedding,
            "untrained model": _embed_untrained(store, trained),
            "PCA of log counts": _principal_components(store, split.train),
        }
        labels = None
        if label in store.obs_columns:
            column = store.obs_column(label)
            labels = column.astype(object).to_numpy()
            known &= column.notna().to_numpy()
        return cls(representations, labels, split.train & known, split.validation & known)

    def macro_f1(self, name: str) -> tuple[float, float]:
        """Return the macro-F1 on held-out cells of a logistic regression fitted on training cells, and its error.

        The standard error is that of resampling the held-out cells.
        """
        from sklearn.linear_model import LogisticRegression
        from sklearn.metrics import f1_score
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler

        assert self.labels is not None
        features, labels = self.representations[name], self.labels
        classifier = make_pipeline(StandardScaler(), LogisticRegression(max_iter=5000))
        classifier.fit(features[self.train], labels[self.train])
        true, predicted = labels[self.held_out], classifier.predict(features[self.held_out])
        draw = np.random.default_rng(0)
        samples = [draw.integers(len(true), size=len(true)) for _ in range(BOOTSTRAPS)]
        scores = [f1_score(true[s], predicted[s], average="macro", zero_division=0) for s in samples]
        return float(f1_score(true, predicted, average="macro", zero_division=0)), float(np.std(scores))


def _embed_untrained(store: CellStore, trained: Any) -> np.ndarray:
    from omegaconf import OmegaConf

    from megacell.geneformer.model.geneformer_model import GeneformerModel
    from megacell.geneformer.model.initial_weights import initialise
    from megacell.training.distributed import device

    twin = GeneformerModel(OmegaConf.create({"network": trained.sizes.to_dict(), "precision": "fp32"}))
    with device.single_process():
        initialise(twin.bert, trained.sizes, int(trained.cfg.provenance.data.seed))
    twin.vocabulary = trained.vocabulary
    embedder = Embedder(twin.to(device.device()).eval(), store.gene_ids, store.symbols)
    blocks = range(0, len(store), ROWS_AT_ONCE)
    return np.concatenate(
        [embedder.embed(store.rows(np.arange(a, min(a + ROWS_AT_ONCE, len(store)))))[0] for a in blocks]
    )


def _principal_components(store: CellStore, train: np.ndarray) -> np.ndarray:
    from sklearn.decomposition import TruncatedSVD

    counts = store.rows(np.arange(len(store))).astype(np.float64)
    counts.data /= np.repeat(np.asarray(counts.sum(1)).ravel(), np.diff(counts.indptr)) / 1e4
    measured = reduce(np.intersect1d, [store.panel(source) for source in range(len(store.sources))])
    logs = counts.log1p()[:, measured]  # genes that every file measures: others would tell the files apart
    centred = TruncatedSVD(min(COMPONENTS + 1, logs.shape[1] - 1), random_state=0).fit(logs[train])
    return centred.transform(logs)


def _metrics(run: Path) -> list[dict[str, float]]:
    with open(run / "metrics.csv", newline="") as file:
        return [{k: float(v) for k, v in row.items() if v} for row in csv.DictReader(file)]


def plot_loss(run: Path, path: Path) -> None:
    """Draw training and held-out loss with the frequency baselines."""
    import matplotlib.pyplot as plt

    rows, summary = _metrics(run), json.loads((run / "summary.json").read_text())
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for column, name, style in (("loss", "training", "-"), ("held_out_loss", "held out", "o-")):
        points = [(row["step"], row[column]) for row in rows if column in row]
        axes.plot(*zip(*points, strict=True), style, label=name, markersize=4)
    for key, name in (("frequency", "gene frequency"), ("rank_frequency", "frequency at that rank")):
        axes.axhline(summary[key], linestyle="--", linewidth=1, color="grey")
        axes.annotate(
            name, (1, summary[key]), xycoords=("axes fraction", "data"), ha="right", va="bottom", color="grey"
        )
    axes.set(xlabel="step", ylabel="loss at masked genes (nats)")
    axes.legend(frameon=False, loc="lower left")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def plot_umap(cells: Cells, path: Path) -> None:
    """Draw a UMAP of the model's embedding beside one of PCA, coloured by label."""
    import matplotlib.pyplot as plt
    import scanpy as sc
    from anndata import AnnData

    names = ("this model", "PCA of log counts")
    figure, panels = plt.subplots(1, 2, figsize=(13, 5), layout="constrained")
    shown = cells.train | cells.held_out
    for axes, name in zip(panels, names, strict=True):
        adata = AnnData(obsm={"X": cells.representations[name][shown].astype(np.float32)}, shape=(int(shown.sum()), 0))
        sc.pp.neighbors(adata, use_rep="X", random_state=0)
        sc.tl.umap(adata, random_state=0)
        points = adata.obsm["X_umap"]
        labels = cells.labels[shown] if cells.labels is not None else np.full(len(points), "cells")
        for number, value in enumerate(np.unique(labels.astype(str))):
            mine = labels.astype(str) == value
            axes.scatter(*points[mine].T, s=8, color=plt.get_cmap("tab20")(number % 20), label=value)
        axes.set(title=name, xticks=[], yticks=[], xlabel="UMAP 1", ylabel="UMAP 2")
    panels[-1].legend(frameon=False, bbox_to_anchor=(1, 1), loc="upper left", markerscale=2)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def print_table(cells: Cells, run: Path, model: Path, store: Path, seconds: float) -> None:
    """Print the demo's table: sizes, speed, losses against the baselines, macro-F1."""
    from rich.console import Console
    from rich.table import Table

    evaluation = evaluate(model, store)
    losses, rows = evaluation.rows[0], _metrics(run)
    rates = [row["tokens_per_second"] for row in rows if "tokens_per_second" in row]
    vocabulary = open_model(model).vocabulary
    nats = lambda name: "not defined" if losses[name] is None else f"{losses[name][0]:.3f} nats"  # noqa: E731
    table = Table(show_header=False, title="what came of it")
    table.add_row("cells", f"{int(cells.train.sum()):,} to train on, {losses['cells']:,} held out")
    table.add_row("genes in the vocabulary", f"{len(vocabulary.gene_ids):,}")
    table.add_row("tokens seen in training", f"{int(sum(row.get('tokens', 0) for row in rows)):,}")
    table.add_row("tokens/s (median, both processes)", f"{np.median(rates):,.0f}")
    table.add_row(f"held-out loss, {losses['masked_genes']:,} masked genes: this model", nats("model"))
    table.add_row("    gene frequency", nats("frequency"))
    table.add_row("    frequency at that rank", nats("rank_frequency"))
    table.add_row("    count arithmetic (no network)", nats("count_arithmetic"))
    if cells.labels is None:
        table.add_row("cell types", "no such column in obs: give --label")
    else:
        held_out = f"{int(cells.held_out.sum()):,} held-out cells, {len(np.unique(cells.labels[cells.held_out]))} types"
        table.add_row(f"cell type, macro-F1 on {held_out}", "")
        for name in cells.representations:
            table.add_row(f"    {name}", "{:.2f} ± {:.2f}".format(*cells.macro_f1(name)))
    table.add_row("time in all", f"{seconds / 60:.1f} min")
    Console(width=100, soft_wrap=True).print(table)
