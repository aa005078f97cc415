# SPDX-License-Identifier: Apache-2.0
"""Opens files that may harm who opens them, one after the other; prints what came of each, as a line of JSON."""

import json
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

FUNCTIONS: dict[str, Callable[..., Any]] = {}
MEMORY = 16 << 30  # bytes of addresses: what wants more fails, and the machine does not


def function(made: Callable[..., Any]) -> Callable[..., Any]:
    """Let a case name a function."""
    FUNCTIONS[made.__name__] = made
    return made


@function
def open_model(path: str) -> str:
    """Open a model in each way that there is."""
    from megacell.geneformer.interchange.open import open_model

    return str(dict(open_model(Path(path)).cfg.provenance))


@function
def restore_from(path: str) -> str:
    """Restore a .nemo file as NeMo's users do."""
    from megacell.geneformer import GeneformerModel

    return str(dict(GeneformerModel.restore_from(path).cfg.provenance))


@function
def trained_on(path: str) -> str:
    """Ask for the store of a model."""
    from megacell.training.interchange.trained_on import store_of

    return str(store_of(Path(path)))


@function
def read_dictionary(path: str) -> str:
    """Read one of Geneformer's dictionaries."""
    from megacell.geneformer.vocabulary.geneformer_dictionaries import read_dictionary

    return str(len(read_dictionary(path, int)))


@function
def open_vocabulary(path: str) -> str:
    """Open a vocabulary."""
    from megacell.geneformer import Vocabulary

    return Vocabulary.open(path).name


@function
def read_corpus(path: str, vocabulary: str) -> str:
    """Do with a tokenised corpus what training and evaluation do."""
    import numpy as np

    from megacell.geneformer import Vocabulary
    from megacell.geneformer.baselines.frequency import TokenFrequency
    from megacell.geneformer.tokens.lengths import token_lengths
    from megacell.geneformer.tokens.packing import gene_tokens
    from megacell.geneformer.tokens.stream import token_stream
    from megacell.geneformer.tokens.token_dataset import TokenFolder

    words = Vocabulary.open(vocabulary)
    cells = TokenFolder.open(path, words)
    frequency, lengths = TokenFrequency(words.size, words.gene_tokens), token_lengths(cells, words)
    stream = token_stream(
        cells, words, np.arange(len(cells)), lengths, max_length=64, global_batch=100, token_budget=20_000, seed=0,
        validation=True,
    )  # fmt: skip
    for step in range(stream.steps_per_epoch):
        for batch in stream.step(step):
            frequency.add(*gene_tokens(batch, words))
    return f"{len(np.unique(cells.cell_hash))} cells, {len(cells.obs_slice())} rows"


@function
def build_vocabulary(path: str) -> str:
    """Build a vocabulary of a store, with histograms."""
    from megacell.geneformer import build_vocabulary
    from megacell.geneformer.vocabulary.histograms import Histograms
    from megacell.store import CellStore

    store = CellStore.open(path)
    vocabulary, _ = build_vocabulary(store, allow_subset=True)
    Histograms.count(store, list(range(len(store))))  # type: ignore[arg-type]
    return str(len(vocabulary.gene_ids))


@function
def megacell(*words: str) -> str:
    """Run a command; what it prints as an error is refused."""
    from runs import here

    from megacell.core.errors import DataError

    code, out, err = here(*words)
    if code == 70:
        raise RuntimeError(err)
    if code:
        raise DataError(err.strip())
    return out


def main(given: Path) -> None:
    """Go through the cases of a file."""
    from megacell.core.errors import MegacellError

    for name in ("megacell.geneformer.interchange.open", "megacell.geneformer.tokens.stream"):
        __import__(name)  # so that the first case does not pay for it
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    for name, what, arguments in json.loads(given.read_text()):
        peak, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
        try:
            kind, text = "opened", FUNCTIONS[what](*arguments)
        except MegacellError as error:
            kind, text = "refused", str(error)
        except BaseException as error:
            kind, text = type(error).__name__, str(error)
        seconds = time.process_time() - start
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak) / 1024
        print(json.dumps([name, kind, text[:3000], seconds, grown]), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
