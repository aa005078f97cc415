# SPDX-License-Identifier: Apache-2.0
"""Geneformer's sub-commands of `megacell`; nothing heavy is imported before a command runs."""

import argparse
from pathlib import Path
from typing import Any


def register(commands: Any) -> None:
    """Add the sub-commands to argparse's sub-parsers."""
    _register_vocabulary(commands)


def _register_vocabulary(commands: Any) -> None:
    parser = commands.add_parser("vocabulary", help="make a vocabulary: genes, tokens, medians")
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)

    build = actions.add_parser("build", help="from the training cells of a store")
    build.add_argument("store", type=Path, metavar="STORE")
    build.add_argument("--out", type=Path, required=True, metavar="VOCAB", help="directory to make")
    build.add_argument(
        "--min-cells", type=int, default=10, help="leave out genes in fewer training cells (default: %(default)s)"
    )
    build.add_argument(
        "--allow-subset", action="store_true", help="take medians from sources with a subset of genes too"
    )
    build.add_argument(
        "--split-by", default="auto", help="auto, cell, source or a column of obs (default: %(default)s)"
    )
    build.add_argument("--holdout", type=float, default=0.1, help="share of cells to hold out (default: %(default)s)")
    build.add_argument("--seed", type=int, default=0, help="of the split (default: %(default)s)")
    build.add_argument("--name", help="default: the store's")
    build.set_defaults(run=_build)

    imported = actions.add_parser("import", help="from Geneformer's dictionaries (V1 or V2)")
    imported.add_argument("--tokens", type=Path, required=True, help="token_dictionary*.pkl")
    imported.add_argument("--medians", type=Path, required=True, help="gene_median_dictionary*.pkl")
    imported.add_argument("--gene-ids", type=Path, help="ensembl_mapping_dict*.pkl: other ids of the genes")
    imported.add_argument("--symbols", type=Path, help="gene_name_id_dict*.pkl: symbols of the genes")
    imported.add_argument("--out", type=Path, required=True, metavar="VOCAB", help="directory to make")
    imported.add_argument("--name", help="default: the edition's")
    imported.set_defaults(run=_import)


def _build(args: argparse.Namespace) -> int:
    from megacell.geneformer.medians import build_vocabulary
    from megacell.geneformer.split import SplitSettings
    from megacell.geneformer.vocabulary import refuse_existing
    from megacell.store import CellStore

    refuse_existing(args.out)
    settings = SplitSettings(by=args.split_by, holdout=args.holdout, seed=args.seed)
    vocabulary, lines = build_vocabulary(
        CellStore.open(args.store), settings, min_cells=args.min_cells, allow_subset=args.allow_subset, name=args.name
    )
    return _save(vocabulary, args.out, lines)


def _import(args: argparse.Namespace) -> int:
    from megacell.geneformer.geneformer_pickles import import_geneformer
    from megacell.geneformer.vocabulary import refuse_existing

    refuse_existing(args.out)
    vocabulary = import_geneformer(args.tokens, args.medians, args.gene_ids, args.symbols, args.name)
    return _save(vocabulary, args.out, [f"{len(vocabulary.aliases):,} other ids and names of its genes"])


def _save(vocabulary: Any, out: Path, lines: list[str]) -> int:
    vocabulary.save(out)
    specials = " ".join(sorted(vocabulary.specials, key=vocabulary.specials.__getitem__))
    for line in lines:
        print(line)
    print(
        f"{out}: vocabulary {vocabulary.name}, {len(vocabulary.gene_ids):,} genes, specials {specials}, "
        f"cells of up to {vocabulary.max_length:,} tokens, sha256 {vocabulary.hash[:12]}…"
    )
    return 0
