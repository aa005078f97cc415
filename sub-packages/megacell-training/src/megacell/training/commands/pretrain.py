# SPDX-License-Identifier: Apache-2.0
"""The sub-command `megacell pretrain`; nothing heavy is imported before it runs."""

import argparse
import signal
import time
from typing import Any

from megacell.core.cli.completion import WORDS
from megacell.core.cli.parsers import add_command
from megacell.core.errors import MegacellError

_PRETRAIN = """\
examples:
  megacell pretrain store=STORE vocabulary=VOCAB model=tiny out=RUN
  megacell pretrain store=STORE vocabulary=VOCAB model=geneformer_10m out=RUN devices=8 precision=bf16 batch.cells=2048
  megacell pretrain store=STORE vocabulary=VOCAB out=RUN devices=2 parallel.tensor=2
  megacell pretrain out=RUN resume=true             go on from the newest checkpoint
  megacell pretrain out=RUN resume=true devices=1 parallel.tensor=1    ... on another layout of ranks
  megacell pretrain store=STORE vocabulary=VOCAB out=RUN launcher=srun launcher.nodes=4 devices=8
  megacell pretrain --multirun store=STORE vocabulary=VOCAB out=SWEEP optim.lr=1e-3,3e-3
  torchrun --nnodes 4 --nproc-per-node 8 -m megacell pretrain store=… vocabulary=… out=…

exit codes: 0 done, 1 bad data, 2 wrong usage, 75 ended by SIGTERM, SIGUSR1 or Ctrl-C after a checkpoint was saved
"""


def register(commands: Any) -> None:
    parser = add_command(commands, "pretrain", "train a model on a store (a Hydra app: OPTION=VALUE)", _PRETRAIN)
    settings = parser.add_argument("settings", nargs="*", metavar="OPTION=VALUE", help="Hydra overrides")
    setattr(settings, WORDS, _option_words)
    parser.add_argument("--cfg", action="store_true", help="print the composed options and stop")
    parser.add_argument(
        "--multirun", action="store_true", help="several runs (OPTION=VALUE,VALUE), in out=SWEEP/0, 1, …"
    )
    parser.set_defaults(run=_pretrain)


def _option_words() -> dict[str, list[str]]:
    from megacell.training.config.option_words import option_words

    return option_words()


def _pretrain(args: argparse.Namespace) -> int:
    if args.cfg:
        from omegaconf import OmegaConf

        from megacell.training.config.settings import compose

        print(OmegaConf.to_yaml(compose(args.settings)), end="")
        return 0
    if args.multirun:
        from megacell.training.run.sweep import main as sweep

        return sweep(args.settings)
    from megacell.training.distributed.launch import end_with_parent, started_by_launcher

    if started_by_launcher():
        end_with_parent()  # before the slow imports: a run can be killed while it starts
    from megacell.training.run.pretrain import main

    try:
        return main(args.settings)
    except MegacellError:
        _let_the_first_rank_say_it()
        raise


def _let_the_first_rank_say_it() -> None:
    """Wait on all other ranks: what is wrong on all of them is one line, and their launcher ends them meanwhile."""
    from megacell.training.distributed.launch import is_first

    if not is_first():
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(30)  # it may be slow to end: only an error that it does not share is told by another
