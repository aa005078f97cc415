# SPDX-License-Identifier: Apache-2.0
"""A model opened, or converted, in a process of its own: seconds, and memory beside what imports take."""

import json
import sys
import time
from pathlib import Path

from megacell.core.machine import peak_memory


def main(arguments: list[str]) -> None:
    """Open a model; with a second path, write it there, as .nemo or for Hugging Face. Prints one JSON object."""
    import torch  # noqa: F401, what imports take counts from here

    start = time.perf_counter()
    from megacell.training.distributed.device import quiet

    quiet()
    import megacell.geneformer.model.bert
    import megacell.geneformer.model.geneformer_model  # noqa: F401
    from megacell.geneformer.interchange import hugging_face
    from megacell.geneformer.interchange.open import open_model
    from megacell.training.interchange import nemo

    imports, before = time.perf_counter() - start, peak_memory()
    start, cpu = time.perf_counter(), time.process_time()
    model = open_model(Path(arguments[0]))
    if arguments[1:]:
        out = Path(arguments[1])
        (nemo if out.suffix == ".nemo" else hugging_face).save(model, out)
    figures = {
        "seconds": time.perf_counter() - start, "cpu_seconds": time.process_time() - cpu,
        "bytes": peak_memory() - before, "imports_seconds": imports,
    }  # fmt: skip
    print(json.dumps(figures))


if __name__ == "__main__":
    main(sys.argv[1:])
