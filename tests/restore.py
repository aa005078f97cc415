# SPDX-License-Identifier: Apache-2.0
"""Logits of models on one pack; run as a script, it restores .nemo files in a process that has never seen a run."""

import sys

import numpy as np
import torch

from megacell.geneformer.model.bert import Pack
from megacell.training.distributed import device


def logits(model, pack: dict[str, np.ndarray]) -> np.ndarray:
    """Return the logits [tokens, vocabulary] of a model at every token of a pack."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # sums in one order, whoever calls
    moved = {name: torch.from_numpy(array) for name, array in pack.items()}
    longest = int(np.diff(pack["cu_seqlens"]).max())
    try:
        with device.single_process(), torch.inference_mode():
            return model.bert.logits(model.bert.encode(Pack(**moved, max_seqlen=longest))).numpy()
    finally:
        torch.set_num_threads(threads)


if __name__ == "__main__":
    from megacell.geneformer.model.geneformer_model import GeneformerModel

    given, results, *models = sys.argv[1:]
    pack = dict(np.load(given))
    np.savez(results, *[logits(GeneformerModel.restore_from(path).eval(), pack) for path in models])
