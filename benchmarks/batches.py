# SPDX-License-Identifier: Apache-2.0
"""How many cells a CPU-second become ranked, masked, packed tokens: ours, plain numpy a cell, a dictionary a gene.

    python benchmarks/batches.py CELLS GENEFORMER [--seconds 5]

CELLS: .h5ad files or folders of them. GENEFORMER: a folder with V2's token and median dictionaries. One thread, warm
pages; all three make the same tokens of the same cells (checked before anything is timed) and mask them at the same
rate. The dictionary loop follows what is told of BioNeMo's collator: each gene of a cell is looked up in dictionaries.
"""

import argparse
import platform
import random
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from megacell.geneformer.batches import BatchStream
from megacell.geneformer.geneformer_pickles import import_geneformer
from megacell.geneformer.lengths import token_lengths
from megacell.geneformer.vocabulary import Vocabulary
from megacell.store import CellStore, convert

MAX_LENGTH, GLOBAL_BATCH, TOKEN_BUDGET = 2048, 512, 65_536
CLS, EOS, MASK = 2, 3, 1
Row = tuple[np.ndarray, np.ndarray]


def dictionary_cell(row: Row, gene_ids: list[str], token_of: dict[str, int], median_of: dict[str, float]) -> list[int]:
    """Rank one cell with a dictionary look-up a gene."""
    total = float(row[1].sum())
    values = []
    for gene, count in zip(row[0].tolist(), row[1].tolist(), strict=True):
        gene_id = gene_ids[gene]
        if gene_id in token_of:
            values.append((-(count / total * 10_000 / median_of[gene_id]), token_of[gene_id]))
    values.sort()
    return [CLS, *(token for _, token in values[: MAX_LENGTH - 2]), EOS]


def dictionary_mask(tokens: list[int], genes: list[int]) -> list[int]:
    """Mask one cell, token by token."""
    out = []
    for token in tokens:
        if token > EOS and random.random() < 0.15:
            kind = random.random()
            token = MASK if kind < 0.8 else random.choice(genes) if kind < 0.9 else token
        out.append(token)
    return out


def numpy_cell(row: Row, tokens: np.ndarray, medians: np.ndarray) -> np.ndarray:
    """Rank one cell with arrays."""
    token = tokens[row[0]]
    known = token >= 0
    token = token[known]
    value = row[1][known] / row[1].sum(dtype=np.float64) * 10_000 / medians[row[0][known]]
    ranked = token[np.lexsort((token, -value))][: MAX_LENGTH - 2]
    return np.concatenate([[CLS], ranked, [EOS]])


def numpy_mask(tokens: np.ndarray, genes: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Mask one cell with arrays."""
    chosen = (rng.random(len(tokens)) < 0.15) & (tokens > EOS)
    kind = rng.random(len(tokens))
    tokens = np.where(chosen & (kind < 0.8), MASK, tokens)
    drawn = chosen & (kind >= 0.8) & (kind < 0.9)
    return np.where(drawn, rng.choice(genes, len(tokens)), tokens)


def rate(work: Callable[[int], int], seconds: float) -> float:
    """Return the cells a CPU-second of ``work(k)``, median of three runs after one that warms up."""
    work(0)
    rates = []
    for _ in range(3):
        cells, k, start = 0, 0, time.process_time()
        while time.process_time() - start < seconds / 3:
            cells += work(k)
            k += 1
        rates.append(cells / (time.process_time() - start))
    return float(np.median(rates))


def compare(store: CellStore, vocabulary: Vocabulary, seconds: float) -> None:
    """Check that the three agree, time them and print the table."""
    lengths = token_lengths(store, vocabulary)
    of_gene = vocabulary.tokens_of(store.gene_ids, store.symbols)
    cells = np.flatnonzero(lengths)
    settings = {"max_length": MAX_LENGTH, "global_batch": GLOBAL_BATCH, "token_budget": TOKEN_BUDGET, "seed": 0}
    stream = BatchStream(store, vocabulary, cells, lengths, **settings)
    matrix = store.rows(cells)
    rows = [(matrix.indices[a:b], matrix.data[a:b]) for a, b in zip(matrix.indptr, matrix.indptr[1:], strict=False)]
    row_of = np.full(len(store), -1)
    row_of[cells] = np.arange(len(cells))
    median_of_token = np.ones(vocabulary.size)
    median_of_token[vocabulary.tokens] = vocabulary.medians
    medians = np.where(of_gene >= 0, median_of_token[of_gene], 1.0)
    ids = list(store.gene_ids)
    token_of = {gene: int(token) for gene, token in zip(ids, of_gene, strict=True) if token >= 0}
    median_dict = {gene: float(median_of_token[token]) for gene, token in token_of.items()}
    genes, rng = vocabulary.gene_tokens, np.random.default_rng(0)
    gene_list = genes.tolist()

    for batch in stream.step(0):
        truth = batch.tokens.copy()
        truth[batch.masked] = batch.labels
        for i, cell in enumerate(batch.cells):
            row = rows[row_of[cell]]
            ours = truth[batch.cu_seqlens[i] : batch.cu_seqlens[i + 1]].tolist()
            assert (
                ours == numpy_cell(row, of_gene, medians).tolist() == dictionary_cell(row, ids, token_of, median_dict)
            )

    def ours(k: int) -> int:
        return sum(len(batch.cells) for batch in stream.step(k))

    def numpy_rows(k: int) -> int:
        part = rows[k * 64 % len(rows) :][:64]
        np.concatenate([numpy_mask(numpy_cell(row, of_gene, medians), genes, rng) for row in part])
        return len(part)

    def dictionary_rows(k: int) -> int:
        part = rows[k * 8 % len(rows) :][:8]
        np.concatenate([dictionary_mask(dictionary_cell(row, ids, token_of, median_dict), gene_list) for row in part])
        return len(part)

    inputs = np.minimum(lengths[cells].astype(int) + 2, MAX_LENGTH)
    print(f"{platform.machine()}, {len(cells):,} cells, {np.diff(matrix.indptr).mean():,.0f} counts and "
          f"{inputs.mean():,.0f} tokens a cell, one thread, cells a CPU-second")  # fmt: skip
    table = {
        "a dictionary look-up a gene, counts in memory": rate(dictionary_rows, seconds),
        "plain numpy a cell, counts in memory": rate(numpy_rows, seconds),
        "megacell, store to packed micro-batches": rate(ours, seconds),
    }
    slowest = min(table.values())
    for name, cells_a_second in table.items():
        print(f"{name:48}{cells_a_second:12,.0f}{cells_a_second / slowest:9.1f} x")


def main() -> None:
    """Convert, import, compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cells", type=Path, nargs="+")
    parser.add_argument("geneformer", type=Path)
    parser.add_argument("--seconds", type=float, default=5.0, help="a measurement (default: %(default)s)")
    args = parser.parse_args()
    dictionaries = [
        next(args.geneformer.glob(f"{name}*.pkl")) for name in ("token_dictionary", "gene_median_dictionary")
    ]
    with tempfile.TemporaryDirectory() as folder:
        convert(args.cells, Path(folder) / "store")
        compare(CellStore.open(Path(folder) / "store"), import_geneformer(*dictionaries), args.seconds)


if __name__ == "__main__":
    main()
