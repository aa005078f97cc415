# SPDX-License-Identifier: Apache-2.0
"""Geneformer's sub-commands of `megacell`; nothing heavy is imported before a command runs."""

import argparse
import signal
import time
from pathlib import Path
from typing import Any

from megacell.geneformer.bench_embed_command import register_bench_embed
from megacell.geneformer.bench_train_command import register_bench_train
from megacell.geneformer.data_commands import add_command, register_data
from megacell.geneformer.doctor import register_doctor
from megacell.geneformer.report_command import register_report
from megacell.geneformer.vocabulary_commands import register_vocabulary
from megacell.store.completion_command import WORDS
from megacell.store.errors import MegacellError


def register(commands: Any) -> None:
    """Add the sub-commands to argparse's sub-parsers."""
    register_vocabulary(commands)
    _register_pretrain(commands)
    _register_export(commands)
    _register_import(commands)
    _register_evaluate(commands)
    _register_embed(commands)
    _register_demo(commands)
    register_data(commands)
    register_bench_train(commands)
    register_bench_embed(commands)
    register_doctor(commands)
    register_report(commands)


_PRETRAIN = """\
examples:
  megacell pretrain store=STORE vocabulary=VOCAB model=tiny out=RUN
  megacell pretrain store=STORE vocabulary=VOCAB model=geneformer_10m out=RUN devices=8 precision=bf16 batch.cells=2048
  megacell pretrain store=STORE vocabulary=VOCAB out=RUN devices=2 parallel.tensor=2
  megacell pretrain out=RUN resume=true             go on from the newest checkpoint
  megacell pretrain out=RUN resume=true devices=1 parallel.tensor=1    ... on another layout of ranks
  megacell pretrain store=STORE vocabulary=VOCAB out=RUN launcher=srun launcher.nodes=4 devices=8
  megacell pretrain --multirun store=STORE vocabulary=VOCAB out=SWEEP optim.lr=1e-3,3e-3
  torchrun --nnodes 4 --nproc-per-node 8 -m megacell.store.cli pretrain store=… vocabulary=… out=…

exit codes: 0 done, 1 bad data, 2 wrong usage, 75 ended by SIGTERM, SIGUSR1 or Ctrl-C after a checkpoint was saved
"""


def _quiet() -> None:
    """Keep NeMo's, Lightning's and Megatron's own lines out of ours, from their import on."""
    from megacell.geneformer.training.device import quiet

    quiet()


def _register_pretrain(commands: Any) -> None:
    parser = add_command(commands, "pretrain", "train a model on a store (a Hydra app: OPTION=VALUE)", _PRETRAIN)
    settings = parser.add_argument("settings", nargs="*", metavar="OPTION=VALUE", help="Hydra overrides")
    setattr(settings, WORDS, _option_words)
    parser.add_argument("--cfg", action="store_true", help="print the composed options and stop")
    parser.add_argument(
        "--multirun", action="store_true", help="several runs (OPTION=VALUE,VALUE), in out=SWEEP/0, 1, …"
    )
    parser.set_defaults(run=_pretrain)


def _option_words() -> dict[str, list[str]]:
    from megacell.geneformer.option_words import option_words

    return option_words()


def _pretrain(args: argparse.Namespace) -> int:
    if args.cfg:
        from omegaconf import OmegaConf

        from megacell.geneformer.training.settings import compose

        print(OmegaConf.to_yaml(compose(args.settings)), end="")
        return 0
    if args.multirun:
        from megacell.geneformer.training.sweep import main as sweep

        return sweep(args.settings)
    from megacell.geneformer.training.launch import end_with_parent, started_by_launcher

    if started_by_launcher():
        end_with_parent()  # before the slow imports: a run can be killed while it starts
    from megacell.geneformer.training.pretrain import main

    try:
        return main(args.settings)
    except MegacellError:
        _let_the_first_rank_say_it()
        raise


def _let_the_first_rank_say_it() -> None:
    """Wait on all other ranks: what is wrong on all of them is one line, and their launcher ends them meanwhile."""
    from megacell.geneformer.training.launch import is_first

    if not is_first():
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(30)  # it may be slow to end: only an error that it does not share is told by another


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
    from megacell.geneformer.interchange import hugging_face, nemo
    from megacell.geneformer.interchange.open import open_model
    from megacell.geneformer.vocabulary import refuse_existing

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
    from megacell.geneformer.interchange.nemo import save
    from megacell.geneformer.interchange.open import open_model
    from megacell.geneformer.vocabulary import Vocabulary, refuse_existing

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
    parser.add_argument("--json", action="store_true", help="print it as JSON")
    parser.set_defaults(run=_evaluate)


def _evaluate(args: argparse.Namespace) -> int:
    _quiet()
    from megacell.geneformer.evaluate import evaluate

    result = evaluate(
        args.model, args.store, by=args.by, cells=args.cells, side=args.split,
        allow_low_coverage=args.allow_low_coverage,
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
    from megacell.geneformer.embedding_file import embed_file

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
    from megacell.geneformer.demo import demo

    demo(args.out, data=args.data, label=args.label, steps=args.steps, tensor=args.tensor)
    return 0
