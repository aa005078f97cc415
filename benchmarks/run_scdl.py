# SPDX-License-Identifier: Apache-2.0
"""One task of bionemo-scdl's, run by an interpreter that has it; prints its figures as JSON.

PYTHON benchmarks/run_scdl.py convert FILE OUT
PYTHON benchmarks/run_scdl.py read ARCHIVE WORKERS SECONDS
"""

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from bionemo.scdl.io.single_cell_memmap_dataset import SingleCellMemMapDataset
from bionemo.scdl.util.torch_dataloader_utils import collate_sparse_matrix_batch
from measuring import BATCH, rates, size_of, timed
from torch.utils.data import DataLoader, RandomSampler


def convert(file: str, out: str) -> dict[str, float]:
    """Convert a file; it saves the archive itself."""
    figures = timed(lambda: SingleCellMemMapDataset(out, h5ad_path=file, use_X_not_raw=True))
    return {**figures, "bytes": size_of(Path(out))}


def read(archive: str, workers: str, seconds: str) -> dict[str, float]:
    """Read random batches as sparse CSR tensors; by one thread a process, as torch's own workers do."""
    torch.set_num_threads(1)
    data = SingleCellMemMapDataset(archive)
    random = RandomSampler(data, replacement=True, num_samples=1 << 30)
    context = "spawn" if int(workers) else None
    loader = DataLoader(
        data, BATCH, sampler=random, collate_fn=collate_sparse_matrix_batch,
        num_workers=int(workers), multiprocessing_context=context,
    )  # fmt: skip

    def batches() -> Iterator[int]:
        for batch in loader:
            yield batch.shape[0]

    return rates(batches(), float(seconds))


if __name__ == "__main__":
    tasks: dict[str, Callable[..., object]] = {"convert": convert, "read": read}
    print(json.dumps(tasks[sys.argv[1]](*sys.argv[2:])))
