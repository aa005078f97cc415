# SPDX-License-Identifier: Apache-2.0
"""One task of annbatch's, run by an interpreter that has it (Python 3.12 on); prints its figures as JSON.

    PYTHON benchmarks/run_annbatch.py convert FILE OUT.zarr
    PYTHON benchmarks/run_annbatch.py read COLLECTION CELLS_A_BLOCK BLOCKS SECONDS

Blocks of one cell are a true shuffle; larger ones mix only what is held at a time, cells a block times blocks.
"""

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import anndata
import zarr
from annbatch import DatasetCollection, Loader
from measuring import BATCH, rates, size_of, timed

zarr.config.set({"codec_pipeline.path": "zarrs.ZarrsCodecPipeline"})


def convert(file: str, out: str) -> dict[str, float]:
    """Convert a file to a shuffled collection."""
    figures = timed(lambda: DatasetCollection(out).add_adatas([file], shuffle=True))
    return {**figures, "bytes": size_of(Path(out))}


def read(collection: str, cells: str, blocks: str, seconds: str) -> dict[str, float]:
    """Read batches as SciPy's CSR, counts alone."""

    def counts(group: zarr.Group) -> anndata.AnnData:
        return anndata.AnnData(X=anndata.io.sparse_dataset(group["X"]))

    def batches() -> Iterator[int]:
        while True:
            loader = Loader(
                batch_size=BATCH, chunk_size=int(cells), preload_nchunks=int(blocks), shuffle=True, drop_last=True
            ).use_collection(DatasetCollection(collection, mode="r"), load_adata=counts)
            for batch in loader:
                yield batch["X"].shape[0]

    return rates(batches(), float(seconds))


if __name__ == "__main__":
    tasks: dict[str, Callable[..., object]] = {"convert": convert, "read": read}
    print(json.dumps(tasks[sys.argv[1]](*sys.argv[2:])))
