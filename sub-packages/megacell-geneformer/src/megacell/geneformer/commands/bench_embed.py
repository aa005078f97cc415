# SPDX-License-Identifier: Apache-2.0
"""The sub-command bench embed; nothing heavy is imported before it runs."""

import argparse
from pathlib import Path
from typing import Any

from megacell.core.cli.parsers import add_command, bench_actions

CONTENDERS = ("as_emb_extractor", "as_helical", "hugging_face_sorted_without_head", "hugging_face_fixed")
_EXAMPLES = """\
examples:
  megacell bench embed CELLS.h5ad --vocabulary geneformer-v1 --json figures.json
  megacell bench embed STORE --vocabulary VOCAB --model geneformer_106m --contenders as_helical --files none

Weights are random and the same in all; the embeddings are compared before anything is measured. Beside it stand
transformers' networks, with the padding of Geneformer's EmbExtractor (by length, a tenth of the cells at a time, 100 at
most) and of Helical (in the cells' order, 24 at a time), both with the head; by length without the head, and padded to
the model's length, which are no package's ways.
"""


def register_bench_embed(commands: Any) -> None:
    """Add `bench embed`."""
    embed = add_command(bench_actions(commands), "embed", "cells embedded a second, beside Hugging Face's", _EXAMPLES)
    embed.add_argument("data", type=Path, metavar="DATA", help="a store, or a file as for convert")
    embed.add_argument("--vocabulary", type=Path, required=True, metavar="VOCAB")
    embed.add_argument("--model", default="geneformer_v1_10m", help="a published configuration (default: %(default)s)")
    embed.add_argument("--cells", type=int, default=128, help="the first of DATA (default: %(default)s)")
    embed.add_argument("--batch", type=int, default=8, help="padded cells of one forward pass (default: %(default)s)")
    embed.add_argument("--rounds", type=int, default=3, help="whose median counts (default: %(default)s)")
    embed.add_argument(
        "--contenders", default=",".join(CONTENDERS), help="what to measure beside it, or none (default: %(default)s)"
    )
    embed.add_argument(
        "--files", default="geneformer_106m", metavar="MODEL",
        help="configuration whose conversion and opening are measured, or none (default: %(default)s)",
    )  # fmt: skip
    embed.add_argument("--json", type=Path, metavar="FILE", help="write the figures here")
    embed.set_defaults(run=run_bench_embed)


def run_bench_embed(args: argparse.Namespace) -> int:
    """Measure, print, write."""
    import json

    from megacell.core.errors import UsageError
    from megacell.training.distributed.device import quiet

    contenders = [] if args.contenders == "none" else args.contenders.split(",")
    if wrong := sorted(set(contenders) - set(CONTENDERS)):
        raise UsageError(f"--contenders {wrong[0]}: choose of {', '.join(CONTENDERS)}, or none")
    for name in ("cells", "batch", "rounds"):
        if getattr(args, name) < 1:
            raise UsageError(f"--{name} {getattr(args, name)}: give 1 or more")
    quiet()
    from megacell.geneformer.bench.embed import bench_embed, bench_files, table
    from megacell.geneformer.vocabulary.vocabulary import Vocabulary
    from megacell.training.config.option_words import option_words

    known = option_words()["model"]
    for option in ("model", "files"):
        if (name := getattr(args, option)) not in [*known, *(["none"] if option == "files" else [])]:
            raise UsageError(f"--{option} {name}: choose of {', '.join(known)}")
    vocabulary = Vocabulary.open(args.vocabulary)
    figures = bench_embed(args.data, vocabulary, args.model, args.cells, args.batch, args.rounds, contenders)
    if args.files != "none":
        figures["files"] = bench_files(vocabulary, args.files, args.rounds)
    print(table(figures))
    if args.json:
        args.json.write_text(json.dumps(figures, indent=1) + "\n")
    return 0
