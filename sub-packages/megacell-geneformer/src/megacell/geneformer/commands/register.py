# SPDX-License-Identifier: Apache-2.0
"""Geneformer's sub-commands of `megacell`; nothing heavy is imported before a command runs."""

import argparse
from pathlib import Path
from typing import Any

from megacell.core.cli.parsers import add_command
from megacell.geneformer.commands.bench_embed import register_bench_embed
from megacell.geneformer.commands.bench_train import register_bench_train
from megacell.geneformer.commands.report import register_report
from megacell.geneformer.commands.tokenize import register_data
from megacell.geneformer.commands.vocabulary import register_vocabulary


def register(commands: Any) -> None:
    """Add the sub-commands to argparse's sub-parsers."""
    register_vocabulary(commands)
    _register_export(commands)
    _register_import(commands)
    _register_evaluate(commands)
    _register_embed(commands)
    _register_demo(commands)
    register_data(commands)
    register_bench_train(commands)
    register_bench_embed(commands)
    register_report(commands)


def _quiet() -> None:
    """Keep NeMo's, Lightning's and Megatron's own lines out of ours, from their import on."""
    from megacell.training.distributed.device import quiet

    quiet()


def _register_export(commands: Any) -> None:
    example = (
        "examples:\n  megacell export RUN --to nemo --out model.nemo\n"
        "  megacell export model.nemo --to hf --out model        a directory that transformers loads"
    )
    parser = add_command(commands, "export", "write a trained model as one portable file or directory", example)
    parser.add_argument("model", type=Path, metavar="MODEL", help="a run (its newest checkpoint), checkpoint or .nemo")
    parser.add_argument("--to", choices=["nemo", "hf"], required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.set_defaults(run=_export)


def _export(args: argparse.Namespace) -> int:
    _quiet()
    from megacell.geneformer.interchange import hugging_face
    from megacell.geneformer.interchange.open import open_model
    from megacell.geneformer.vocabulary.vocabulary import refuse_existing
    from megacell.training.interchange import nemo

    refuse_existing(args.out)
    model = open_model(args.model)
    (nemo if args.to == "nemo" else hugging_face).save(model, args.out)
    _say_written(args.out, f"step {model.cfg.provenance.step}")
    return 0


def _say_written(out: Path, what: str) -> None:
    size = sum(file.stat().st_size for file in (out.rglob("*") if out.is_dir() else [out]) if file.is_file())
    print(f"{out}: {what}, {size / 2**20:.1f} MiB")


def _register_import(commands: Any) -> None:
    example = (
        "examples:\n  megacell import Geneformer-V2-104M --vocabulary geneformer-v2 --out geneformer.nemo\n"
        "  megacell import bionemo-1.nemo --out geneformer.nemo       a Megatron BERT of NeMo 1 or BioNeMo 1\n"
        "  megacell pretrain … model=geneformer_v2_104m init=Geneformer-V2-104M       goes on training it"
    )
    parser = add_command(commands, "import", "make a .nemo file of a published model", example)
    parser.add_argument(
        "model",
        type=Path,
        metavar="DIR|F.nemo",
        help="Hugging Face directory of a BERT for masked genes, or NeMo 1's file",
    )
    parser.add_argument(
        "--vocabulary", type=Path, metavar="VOCAB", help="where the model has none in it (fetched, of Geneformer's)"
    )
    parser.add_argument("--out", type=Path, required=True, metavar="F.nemo")
    parser.set_defaults(run=_import_model)


def _import_model(args: argparse.Namespace) -> int:
    _quiet()
    from megacell.geneformer.interchange.open import open_model
    from megacell.geneformer.vocabulary.vocabulary import Vocabulary, refuse_existing
    from megacell.training.interchange.nemo import save

    refuse_existing(args.out)
    model = open_model(args.model, Vocabulary.open(args.vocabulary) if args.vocabulary else None)
    save(model, args.out)
    _say_written(args.out, f"{model.sizes.layers} layers, vocabulary {model.vocabulary.name}")
    return 0


def _register_evaluate(commands: Any) -> None:
    example = "example:\n  megacell evaluate RUN STORE --by cell_type"
    parser = add_command(commands, "evaluate", "held-out loss of a model beside baselines that need none", example)
    parser.add_argument(
        "model", type=Path, metavar="MODEL", help=".nemo file, Hugging Face directory, run or checkpoint"
    )
    parser.add_argument("store", type=Path, metavar="STORE")
    parser.add_argument("--by", metavar="COLUMN", help="also by the values of an obs column")
    parser.add_argument("--cells", type=int, default=2000, help="most held-out cells (default: %(default)s)")
    parser.add_argument(
        "--split", choices=["validation", "test"], default="validation",
        help="test: the cells that data.split.test kept from the run (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--allow-low-coverage", action="store_true", help="take a store of under 25 %% of the genes")
    parser.add_argument(
        "--same-choice", action="store_true",
        help="choose cells of another store, too, by the data.where and data.exclude of the model's run",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print it as JSON")
    parser.set_defaults(run=_evaluate)


def _evaluate(args: argparse.Namespace) -> int:
    _quiet()
    from megacell.geneformer.evaluation.evaluate import evaluate

    result = evaluate(
        args.model, args.store, by=args.by, cells=args.cells, side=args.split,
        allow_low_coverage=args.allow_low_coverage, same_choice=args.same_choice,
    )  # fmt: skip
    print(result.to_json() if args.json else result.table())
    return 0


def _register_embed(commands: Any) -> None:
    example = "example:\n  megacell embed model.nemo cells.h5ad --out embedded.h5ad"
    parser = add_command(commands, "embed", "embed cells; writes obsm['X_megacell'] in the input's order", example)
    parser.add_argument(
        "model", type=Path, metavar="MODEL", help=".nemo file, Hugging Face directory, run or checkpoint"
    )
    parser.add_argument("data", type=Path, metavar="DATA", help="a store, or a file as for convert")
    parser.add_argument("--out", type=Path, required=True, metavar="F.h5ad|F.npy|F.parquet")
    parser.add_argument("--pool", choices=["mean", "cls"], default="mean", help="default: %(default)s")
    parser.add_argument(
        "--layer", default="second_to_last", help="last, second_to_last or a number from 1 (default: %(default)s)"
    )
    parser.add_argument("--counts", default="auto", help="which matrix holds counts, as in convert")
    parser.add_argument("--gene-ids", default="auto", help="where gene ids stand, as in convert")
    parser.add_argument("--allow-subset", action="store_true", help="take a file with a selection of genes")
    parser.add_argument("--allow-low-coverage", action="store_true", help="take a file of under 25 %% of the genes")
    parser.set_defaults(run=_embed)


def _embed(args: argparse.Namespace) -> int:
    _quiet()
    from megacell.geneformer.embedding.files import embed_file

    for line in embed_file(
        args.model, args.data, args.out, pool=args.pool, layer=args.layer, counts=args.counts,
        gene_ids=args.gene_ids, allow_subset=args.allow_subset, allow_low_coverage=args.allow_low_coverage,
    ):  # fmt: skip
        print(line)
    return 0


def _register_demo(commands: Any) -> None:
    example = "examples:\n  megacell demo\n  megacell demo --data FOLDER --out demo --tensor 2"
    parser = add_command(commands, "demo", "the whole path on real cells, in a few minutes on two CPU cores", example)
    parser.add_argument("--out", type=Path, default=Path("demo"), help="folder to make (default: %(default)s)")
    parser.add_argument("--data", type=Path, help="your folder of .h5ad files, in place of scanpy's PBMC")
    parser.add_argument("--label", default="cell_type", help="obs column of cell types (default: %(default)s)")
    parser.add_argument("--steps", type=int, help="training steps (default: the demo's)")
    parser.add_argument("--tensor", type=int, choices=[1, 2], default=1, help="2: tensor instead of data parallel")
    parser.set_defaults(run=_demo)


def _demo(args: argparse.Namespace) -> int:
    _quiet()
    from megacell.geneformer.demo.demo import demo

    demo(args.out, data=args.data, label=args.label, steps=args.steps, tensor=args.tensor)
    return 0
