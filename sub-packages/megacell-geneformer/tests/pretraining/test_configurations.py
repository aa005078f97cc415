# SPDX-License-Identifier: Apache-2.0
"""Published configurations: their sizes against the published counts, their settings through Hydra, their schedules."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

from megacell.core.errors import UsageError
from megacell.geneformer.model.bert import PackedBert
from megacell.geneformer.model.config import ModelConfig
from megacell.geneformer.pretraining.family import GENEFORMER
from megacell.geneformer.pretraining.settings import model_config
from megacell.training.config import settings
from megacell.training.distributed import device
from megacell.training.engine import schedule
from megacell.training.nn.layout import Layout

GROUPS = {group: sorted(p.stem for p in (GENEFORMER.configs / group).glob("*.yaml"))
          for group in ("model", "optim", "experiment")}  # fmt: skip
COUNTS = {  # vocabulary, and the parameters that Hugging Face's BERT of these sizes has
    "geneformer_v1_10m": (25426, 10_288_722),
    "geneformer_v1_40m": (25426, 39_591_250),
    "geneformer_v2_38m": (20275, 37_997_363),
    "geneformer_v2_151m": (20275, 151_313_459),
    "geneformer_v2_104m": (20275, 104_386_867),
    "geneformer_v2_316m": (20275, 316_354_867),
    "geneformer_10m": (25429, 10_289_493),
    "geneformer_31m": (25429, 30_657_365),
    "geneformer_106m": (25429, 106_777_429),
    "geneformer_1b": (25429, 981_360_469),
}
SAID = {"10m": 10, "31m": 31, "38m": 38, "40m": 40, "104m": 104, "106m": 106, "151m": 151, "316m": 316, "1b": 1000}
GIVEN = ["store=s", "vocabulary=v", "out=o"]
LACKING = {  # what the published figures do not say, or only the user can
    "geneformer_1b": ["batch.cells=2048"],
    "geneformer_v2_38m": ["steps=8900000"],
    "geneformer_v2_104m": ["steps=1300000"],
    "geneformer_v2_104m_clcancer": ["steps=180000", "init=model.nemo"],
}


OPTIONS = {  # heads, length, dropouts of hidden states and attention, norm, activation
    "geneformer_v1_10m": (4, 2048, 0.02, 0.02, "post", "relu"),
    "geneformer_v1_40m": (8, 2048, 0.02, 0.02, "post", "relu"),
    "geneformer_v2_38m": (8, 4096, 0.02, 0.02, "post", "relu"),
    "geneformer_v2_151m": (14, 4096, 0.02, 0.02, "post", "relu"),
    "geneformer_v2_104m": (12, 4096, 0.1, 0.1, "post", "relu"),
    "geneformer_v2_316m": (18, 4096, 0.1, 0.1, "post", "relu"),
    "geneformer_10m": (4, 2048, 0.02, 0.1, "pre", "gelu"),
    "geneformer_31m": (8, 1024, 0.02, 0.1, "pre", "gelu"),
    "geneformer_106m": (12, 2048, 0.02, 0.1, "pre", "gelu"),
    "geneformer_1b": (20, 2048, 0.1, 0.1, "pre", "gelu"),
}
TRAINING = {  # rate, schedule, warm-up, weight decay, cells a step, steps where published, precision, random genes
    "geneformer_v1_10m": (1e-3, "linear", 10_000, 0.001, 144, 570_963, "fp32", 0.1),
    "geneformer_v1_40m": (5e-4, "linear", 10_000, 0.001, 48, 1_712_889, "fp32", 0.1),
    "geneformer_v2_38m": (5e-4, "cosine", 5_000, 0.001, 32, None, "fp32", 0.1),
    "geneformer_v2_104m": (2e-4, "cosine", 0.007, 0.001, 234, None, "fp32", 0.1),
    "geneformer_v2_104m_clcancer": (2e-4, "cosine", 0.007, 0.001, 234, None, "fp32", 0.1),
    "geneformer_10m": (1e-3, "cosine", 0.01, 0.1, 2048, 115_430, "bf16", 0.02),
    "geneformer_106m": (1e-3, "cosine", 0.01, 0.1, 2048, 115_430, "bf16", 0.02),
    "geneformer_1b": (4e-4, "cosine", 500, 0.1, None, 123_125, "bf16", 0.02),
}


def network(name: str, vocabulary: int) -> ModelConfig:
    values = OmegaConf.to_container(OmegaConf.load(GENEFORMER.configs / "model" / f"{name}.yaml"))
    return ModelConfig.of({**values, "vocabulary_size": vocabulary})


def test_every_model_but_tiny_has_its_count_here():
    assert set(GROUPS["model"]) == {*COUNTS, "tiny"}


@pytest.mark.parametrize("name", OPTIONS)
def test_a_model_has_the_published_options(name):
    sizes = network(name, 1000)
    dropouts = sizes.hidden_dropout, sizes.attention_dropout
    assert (sizes.heads, sizes.max_length, *dropouts, sizes.norm, sizes.activation) == OPTIONS[name]
    assert (sizes.tied_head, sizes.init_std, sizes.layernorm_epsilon) == (True, 0.02, 1e-12)
    assert set(OPTIONS) == set(COUNTS)


@pytest.mark.parametrize("name", TRAINING)
def test_an_experiment_has_the_published_training(name):
    *rest, cells, steps, precision, random = TRAINING[name]
    cfg = settings.compose([*GIVEN, f"experiment={name}", *LACKING.get(name, [])])
    assert [cfg.optim[key] for key in ("lr", "schedule", "warmup", "weight_decay")] == rest
    assert (cfg.optim.beta1, cfg.optim.beta2, cfg.optim.clip) == (0.9, 0.999, 1.0)
    assert cells is None or cfg.batch.cells == cells
    assert steps is None or cfg.steps == steps
    masking = cfg.data.masking
    assert (cfg.precision, masking.rate, masking.mask, masking.random) == (precision, 0.15, 0.8, random)
    assert set(TRAINING) == set(GROUPS["experiment"]) - {"demo"}


@pytest.mark.parametrize("name", COUNTS)
def test_a_model_has_the_parameters_it_is_named_for(name):
    vocabulary, count = COUNTS[name]
    sizes = network(name, vocabulary)
    with device.single_process(), torch.device("meta"):
        ours = sum(parameter.numel() for parameter in PackedBert(sizes, Layout()).parameters())
    padding = (sizes.padded_vocabulary - vocabulary) * (sizes.hidden + 1)  # rows of the embedding, and of the bias
    assert ours - padding + 2 * sizes.hidden == count  # two token types, which ours holds in the positions
    assert abs(count / 1e6 / SAID[name.rpartition("_")[2]] - 1) < 0.035


@pytest.mark.parametrize("name", COUNTS)
def test_hugging_faces_bert_of_these_sizes_has_as_many(name):
    transformers = pytest.importorskip("transformers")
    vocabulary, count = COUNTS[name]
    sizes = network(name, vocabulary)
    kind = "Bert" if sizes.norm == "post" else "MegatronBert"
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=vocabulary, hidden_size=sizes.hidden, num_hidden_layers=sizes.layers,
        num_attention_heads=sizes.heads, intermediate_size=sizes.ffn, max_position_embeddings=sizes.max_length,
    )  # fmt: skip
    with torch.device("meta"):
        theirs = getattr(transformers, f"{kind}ForMaskedLM")(config)
    assert sum(parameter.numel() for parameter in theirs.parameters()) == count


@pytest.mark.parametrize("group", ["model", "optim", "experiment"])
def test_every_published_configuration_names_its_source(group):
    ours = {"tiny", "adamw", "demo"}
    for name in set(GROUPS[group]) - ours:
        assert "Source: " in (GENEFORMER.configs / group / f"{name}.yaml").read_text(), name


@pytest.mark.parametrize("name", GROUPS["model"])
def test_every_model_composes(name):
    cfg = settings.compose([*GIVEN, f"model={name}", "batch.tokens=8192"])
    assert model_config(cfg, 1000).to_dict() == network(name, 1000).to_dict()


@pytest.mark.parametrize("name", GROUPS["experiment"])
def test_every_experiment_composes_once_what_was_not_published_is_given(name):
    given = LACKING.get(name, [])
    cfg = settings.compose([*GIVEN, f"experiment={name}", *given])
    if name in GROUPS["model"]:
        assert model_config(cfg, 1000).to_dict() == network(name, 1000).to_dict()
    for left_out in given:
        rest = [g for g in given if g != left_out]
        with pytest.raises(UsageError, match=f"{left_out.split('=')[0]}=… must be given"):
            settings.compose([*GIVEN, f"experiment={name}", *rest])


# schedules


def rates(*overrides: str) -> tuple[np.ndarray, int]:
    """Return the rate of each step, and their number."""
    cfg = settings.compose([*GIVEN, *overrides])
    groups = [{"lr": 0.0, "weight_decay": 0.0}]
    scheduler, found = schedule(cfg, SimpleNamespace(param_groups=groups)), []
    for _ in range(cfg.steps):
        scheduler.step(1)
        found.append(groups[0]["lr"])
    return np.array(found), cfg.steps


def test_v1s_rate_rises_for_10_000_steps_and_falls_linearly_to_zero():
    found, steps = rates("experiment=geneformer_v1_10m", "steps=30000")
    n = np.arange(1, steps + 1)
    np.testing.assert_allclose(found, 1e-3 * np.where(n <= 1e4, n / 1e4, (steps - n) / (steps - 1e4)), atol=1e-12)


def test_v2s_rate_follows_a_cosine_after_its_warm_up():
    found, steps = rates("experiment=geneformer_v2_104m", "steps=10000")
    n, warm = np.arange(1, steps + 1), 70
    cosine = 0.5 * (1 + np.cos(math.pi * (n - warm) / (steps - warm)))
    np.testing.assert_allclose(found, 2e-4 * np.where(n <= warm, n / warm, cosine), atol=1e-12)


def test_bionemos_rate_stays_lowest_for_the_last_twentieth():
    found, steps = rates("experiment=geneformer_106m", "steps=10000")
    n, warm, end = np.arange(1, steps + 1), 100, 9500
    cosine = 2e-5 + (1e-3 - 2e-5) * 0.5 * (1 + np.cos(math.pi * (n - warm) / (end - warm)))
    expected = np.where(n <= warm, 1e-3 * n / warm, np.where(n < end, cosine, 2e-5))
    np.testing.assert_allclose(found, expected, atol=1e-12)
    assert (found[end:] == 2e-5).all()


def test_a_constant_rate_stays_where_the_warm_up_leads():
    found, _ = rates("optim.schedule=constant", "optim.warmup=10", "steps=100")
    np.testing.assert_allclose(found, 1e-3 * np.minimum(np.arange(1, 101) / 10, 1))


def test_paths_may_hold_anything():
    paths = {"store": "data/donor=3,b/cells store", "vocabulary": "v[1] {x} 'ü'", "out": "it's \\ out", "init": "1e3"}
    cfg = settings.compose([f"{name}={path}" for name, path in paths.items()])
    assert {name: cfg[name] for name in paths} == paths
