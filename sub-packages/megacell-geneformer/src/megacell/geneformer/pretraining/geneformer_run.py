# SPDX-License-Identifier: Apache-2.0
"""One run of a Geneformer: its data, network, checks and baselines, as `megacell.training` asks for them."""

import shlex
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from megacell.core.errors import DataError
from megacell.geneformer.baselines.frequency import TokenFrequency, frequency_log_prior
from megacell.geneformer.interchange.open import check_fit, load_into
from megacell.geneformer.model.bert import Pack, PackedBert
from megacell.geneformer.model.initial_weights import initialise
from megacell.geneformer.model.provenance import check_facts
from megacell.geneformer.pretraining import settings
from megacell.geneformer.pretraining.data import TrainingData, choice
from megacell.geneformer.pretraining.frequency_baselines import fit_frequencies, frequency_losses, save_frequencies
from megacell.geneformer.tokens.packing import MicroBatch
from megacell.geneformer.vocabulary.vocabulary import FILES
from megacell.store.sampling.batch_stream import BatchStream
from megacell.training.family import About, Baselines
from megacell.training.nn.attention_backends import choose_backend
from megacell.training.nn.layout import Layout
from megacell.training.run.recorded import store_record


class GeneformerRun:
    """The cells and the network of one run; see `megacell.training.family.FamilyRun`.

    Attributes
    ----------
    cfg : DictConfig
    data : TrainingData
    network : ModelConfig
    """

    unit = "nats"

    def __init__(self, cfg: DictConfig, facts: Mapping[str, Any] | None):
        self.cfg = cfg
        theirs = check_facts(facts, str(cfg.out)) if facts else None
        self.data = TrainingData.open(cfg, facts["store"] if facts else None)
        self.network = settings.model_config(cfg, self.data.vocabulary.size)
        if theirs is not None and (differ := self.network.differing(theirs)):
            raise DataError(f"{cfg.out}: the {', '.join(differ)} of config.yaml are not those of its checkpoint")
        self._init = Path(cfg.init) if cfg.init and not cfg.resume else None
        if self._init:
            check_fit(self.network, self.data.vocabulary, self._init)  # before a run folder is made

    @property
    def lines(self) -> list[str]:
        """Coverage, split, cells that are skipped, how they are drawn."""
        return self.data.lines

    @property
    def digest(self) -> str:
        """The store's at its generation."""
        return self.data.store.digest

    def stream(
        self, *, held_out: bool = False, rank: int = 0, ranks: int = 1, tensor: int = 1
    ) -> BatchStream[MicroBatch]:
        """Return the steps of a data parallel rank."""
        return self.data.stream(held_out=held_out, rank=rank, ranks=ranks, tensor=tensor)

    def build(self, layout: Layout) -> PackedBert:
        """Return the network of this rank."""
        return PackedBert(self.network, layout)

    def fill(self, network: PackedBert) -> None:
        """Give it its initial weights: of another model, or drawn, the LM head's bias from the genes' frequencies."""
        if self._init:
            load_into(network, self.network, self.data.vocabulary, self._init)
            return
        bias = torch.from_numpy(frequency_log_prior(self.frequency)).float() if self.cfg.data.head_bias else None
        initialise(network, self.network, self.cfg.seed, bias)

    def pack(self, batch: MicroBatch, device: torch.device) -> Pack:
        """Move a micro-batch to the device."""
        return Pack.of(batch, device)

    def describe(self, network: PackedBert) -> str:
        """Return which attention and which dropout."""
        parameter = next(network.parameters())
        backend = choose_backend(parameter.device, parameter.dtype, self.cfg.attention)
        return f"attention: {backend}, dropout {self.cfg.model.attention_dropout}"

    def facts(self) -> dict[str, Any]:
        """Return network, vocabulary, store, and how cells were chosen and masked."""
        return {
            "network": self.network.to_dict(),
            "vocabulary": self.data.vocabulary.hash,
            "store": store_record(self.data.store),
            "data": {
                "split": asdict(self.data.settings),
                "choice": choice(self.cfg.data),
                "masking": OmegaConf.to_container(self.cfg.data.masking),
                "seed": self.cfg.seed,
            },
        }

    def check_facts(self, facts: Mapping[str, Any], checkpoint: Path) -> None:
        """Raise DataError for a checkpoint of another vocabulary."""
        if facts["vocabulary"] != self.data.vocabulary.hash:
            raise DataError(f"{checkpoint}: was trained with another vocabulary than {self.cfg.vocabulary}")

    def write_inputs(self, out: Path) -> None:
        """Copy the vocabulary, without its histograms, for which a run has no use."""
        (out / "vocabulary").mkdir(exist_ok=True)
        for name in FILES:
            shutil.copy2(Path(self.cfg.vocabulary) / name, out / "vocabulary" / name)

    def about(self, out: Path) -> About:
        """Return what can be done with the run, and what it was made from."""
        run, store = shlex.quote(str(out.resolve())), shlex.quote(str(Path(self.cfg.store).resolve()))
        cells, vocabulary = self.data.store, self.data.vocabulary
        return About(
            commands=[
                ("held-out loss beside baselines", f"megacell evaluate {run} {store}"),
                ("one portable file", f"megacell export {run} --to nemo --out {run}/model.nemo"),
                ("cells' embeddings", f"megacell embed {run} CELLS.h5ad --out EMBEDDED.h5ad"),
                ("one page that shows it all", f"megacell report {run}"),
                ("a new run from its weights",
                 f"megacell pretrain init={run} vocabulary={run}/vocabulary store=STORE out=NEW"),
            ],
            files=[
                ("vocabulary/", "a copy of the vocabulary"),
                ("baselines.npz", "the frequency baselines, fitted on training cells"),
            ],
            made_from=(
                f"Store {store}: {len(cells):,} cells, generation {cells.generation}, digest {cells.digest}. "
                f"Vocabulary {vocabulary.name}: {len(vocabulary.gene_ids):,} genes, sha256\n{vocabulary.hash}."
            ),
        )  # fmt: skip

    def baselines(self, out: Path) -> Baselines:
        """Return the loss of the genes' frequencies, over all ranks and at each, on the held-out masked genes."""
        save_frequencies(self.frequency, out / "baselines.npz")
        losses = frequency_losses(self.frequency, self.data)
        frequency, at_rank = losses["frequency"], losses["rank_frequency"]
        return Baselines(
            losses,
            f"held-out baselines over {losses['masked_genes']:,} masked genes: gene frequency {frequency:.3f} nats, "
            f"frequency at that rank {at_rank:.3f}",
            f"gene frequency {frequency:.3f}, at that rank {at_rank:.3f}",
        )

    @cached_property
    def frequency(self) -> TokenFrequency:
        """The frequency baselines, fitted on training cells; the same on every rank."""
        return fit_frequencies(self.data, self.cfg.data.baseline_cells)
