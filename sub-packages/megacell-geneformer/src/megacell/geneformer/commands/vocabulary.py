# SPDX-License-Identifier: Apache-2.0
"""The sub-commands about vocabularies; nothing heavy is imported before a command runs."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megacell.core.errors import UsageError

_BIONEMO = (
    "lay cells out as BioNeMo's Geneformer does: cls in front, 2,048 tokens (to train; its own have other tokens)"
)
_SPLIT = {"split_by": "by", "holdout": "holdout", "test": "test", "seed": "seed"}  # options → fields of SplitSettings
_NOT_GIVEN = argparse.SUPPRESS  # with --after, what is not given is as it was


def register_vocabulary(commands: Any) -> None:
    """Add the sub-commands to argparse's sub-parsers."""
    parser = commands.add_parser("vocabulary", help="make a vocabulary: genes, tokens, medians")
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    _register_build(actions)
    _register_merge(actions)
    _register_import(actions)
    _register_fetch(actions)


def _add_out(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, required=True, metavar="VOCAB", help="directory to make")


def _add_min_cells(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--min-cells", type=int, default=_NOT_GIVEN, help="leave out genes in fewer training cells (default: 10)"
    )


def _register_build(actions: Any) -> None:
    build = actions.add_parser("build", help="from the training cells of a store, or of several together")
    build.add_argument("stores", type=Path, nargs="+", metavar="STORE")
    _add_out(build)
    _add_min_cells(build)
    build.add_argument(
        "--allow-subset", action="store_true", help="take medians from sources with a subset of genes too"
    )
    build.add_argument("--split-by", default=_NOT_GIVEN, help="auto, cell, source or a column of obs (default: auto)")
    build.add_argument("--holdout", type=float, default=_NOT_GIVEN, help="share of cells to hold out (default: 0.1)")
    build.add_argument("--test", type=float, default=_NOT_GIVEN, help="share of cells kept for a test (default: 0.0)")
    build.add_argument("--seed", type=int, default=_NOT_GIVEN, help="of the split (default: 0)")
    build.add_argument("--name", help="default: the stores'")
    build.add_argument("--workers", type=int, default=None, help="threads (default: one a core)")
    build.add_argument(
        "--mergeable", action="store_true", help="write histograms of all genes too, for `merge` and --after"
    )
    build.add_argument(
        "--after", type=Path, metavar="VOCAB",
        help="read only cells appended since this was made, --mergeable; its settings are the defaults",
    )  # fmt: skip
    build.set_defaults(run=_build)


def _build(args: argparse.Namespace) -> int:
    import os

    from megacell.geneformer.vocabulary.build import TrainingCells, build_exactly
    from megacell.geneformer.vocabulary.histogram_file import Counted
    from megacell.geneformer.vocabulary.merge import build_after
    from megacell.geneformer.vocabulary.vocabulary import refuse_existing
    from megacell.store import CellStore
    from megacell.store.sampling.split import SplitSettings

    refuse_existing(args.out)
    if args.workers is not None and args.workers < 1:
        raise UsageError(f"--workers {args.workers}: give 1 or more")
    if args.after and len(args.stores) > 1:
        raise UsageError(f"--after: give one store, not {len(args.stores)}; vocabularies of several can be merged")
    workers = args.workers or os.cpu_count() or 1
    split = {field: getattr(args, option) for option, field in _SPLIT.items() if hasattr(args, option)}
    min_cells = {"min_cells": args.min_cells} if hasattr(args, "min_cells") else {}
    stores = [CellStore.open(path) for path in args.stores]
    if args.after:
        vocabulary, counted, lines = build_after(
            stores[0], args.after, split, allow_subset=args.allow_subset, name=args.name, workers=workers, **min_cells
        )
        return _save(vocabulary, args.out, lines, counted)
    training = TrainingCells.of(stores, SplitSettings(**split), args.allow_subset)
    vocabulary, lines = build_exactly(training, name=args.name, workers=workers, **min_cells)
    return _save(vocabulary, args.out, lines, Counted.of(training, workers) if args.mergeable else None)


def _register_merge(actions: Any) -> None:
    merge = actions.add_parser("merge", help="from vocabularies built --mergeable, as if of all their cells together")
    merge.add_argument("vocabularies", type=Path, nargs="+", metavar="VOCAB")
    _add_out(merge)
    _add_min_cells(merge)
    merge.add_argument("--name", help="default: the vocabularies'")
    merge.set_defaults(run=_merge)


def _merge(args: argparse.Namespace) -> int:
    from megacell.geneformer.vocabulary.merge import merge_vocabularies
    from megacell.geneformer.vocabulary.vocabulary import refuse_existing

    refuse_existing(args.out)
    min_cells = {"min_cells": args.min_cells} if hasattr(args, "min_cells") else {}
    vocabulary, counted, lines = merge_vocabularies(args.vocabularies, name=args.name, **min_cells)
    return _save(vocabulary, args.out, lines, counted)


def _register_import(actions: Any) -> None:
    imported = actions.add_parser("import", help="from Geneformer's dictionaries (V1 or V2), or BioNeMo's")
    imported.add_argument("--tokens", type=Path, required=True, help="token_dictionary*.pkl, or geneformer.vocab")
    imported.add_argument("--medians", type=Path, required=True, help="gene_median_dictionary*.pkl, or medians.json")
    imported.add_argument("--gene-ids", type=Path, help="ensembl_mapping_dict*.pkl: other ids of the genes")
    imported.add_argument("--symbols", type=Path, help="gene_name_id_dict*.pkl: symbols of the genes")
    _add_out(imported)
    imported.add_argument("--name", help="default: the edition's")
    imported.add_argument("--bionemo", action="store_true", help=_BIONEMO)
    imported.set_defaults(run=_import)


def _import(args: argparse.Namespace) -> int:
    from megacell.geneformer.vocabulary.bionemo_dictionaries import import_bionemo, is_bionemo
    from megacell.geneformer.vocabulary.geneformer_dictionaries import import_geneformer
    from megacell.geneformer.vocabulary.vocabulary import refuse_existing

    refuse_existing(args.out)
    if is_bionemo(args.tokens):
        vocabulary = import_bionemo(args.tokens, args.medians, args.name)
    else:
        vocabulary = import_geneformer(args.tokens, args.medians, args.gene_ids, args.symbols, args.name)
        vocabulary = vocabulary.for_bionemo() if args.bionemo else vocabulary
    return _save(vocabulary, args.out, [f"{len(vocabulary.aliases):,} other ids and names of its genes"])


def _register_fetch(actions: Any) -> None:
    fetched = actions.add_parser("fetch", help="Geneformer's published dictionaries, from Hugging Face")
    fetched.add_argument("edition", choices=["geneformer-v1", "geneformer-v2"])
    _add_out(fetched)
    fetched.add_argument("--bionemo", action="store_true", help=_BIONEMO)
    fetched.set_defaults(run=_fetch)


def _fetch(args: argparse.Namespace) -> int:
    from megacell.geneformer.vocabulary.published import fetch_geneformer
    from megacell.geneformer.vocabulary.vocabulary import refuse_existing

    refuse_existing(args.out)
    vocabulary = fetch_geneformer(args.edition)
    if args.bionemo:
        vocabulary = vocabulary.for_bionemo()
    return _save(vocabulary, args.out, [f"{len(vocabulary.aliases):,} other ids and names of its genes"])


def _save(vocabulary: Any, out: Path, lines: Sequence[str], counted: Any = None) -> int:
    vocabulary.save(out, (lambda folder: counted.write(folder, vocabulary)) if counted else None)
    specials = " ".join(sorted(vocabulary.specials, key=vocabulary.specials.__getitem__))
    for line in lines:
        print(line)
    print(
        f"{out}: vocabulary {vocabulary.name}, {len(vocabulary.gene_ids):,} genes, specials {specials}, "
        f"cells of up to {vocabulary.max_length:,} tokens, sha256 {vocabulary.hash[:12]}…"
    )
    return 0
