# SPDX-License-Identifier: Apache-2.0
"""Every published configuration, two layers deep, and the smallest whole, against `transformers`."""

import pytest
import torch
from hugging import cells_of
from omegaconf import OmegaConf

from megacell.geneformer.interchange import hugging_face
from megacell.geneformer.interchange.hugging_face import to_ours
from megacell.geneformer.model.bert import PackedBert
from megacell.geneformer.model.config import ModelConfig
from megacell.geneformer.pretraining.family import GENEFORMER
from megacell.training.distributed import device
from megacell.training.nn.layout import Layout
from megacell.training.nn.weights import copy_whole

transformers = pytest.importorskip("transformers")
NAMES = sorted(p.stem for p in (GENEFORMER.configs / "model").glob("*.yaml") if p.stem != "tiny")
VARIANTS = [(norm, activation) for norm in ("post", "pre") for activation in ("relu", "gelu")]


def published(name: str, **changes) -> ModelConfig:
    values = OmegaConf.to_container(OmegaConf.load(GENEFORMER.configs / "model" / f"{name}.yaml"))
    return ModelConfig.of({**values, "vocabulary_size": 103, **changes})


def check(network: ModelConfig, lengths):
    kind = "Bert" if network.norm == "post" else "MegatronBert"
    config = getattr(transformers, f"{kind}Config")(**hugging_face._config(network))
    torch.manual_seed(0)
    reference = getattr(transformers, f"{kind}ForMaskedLM")(config).eval()
    with torch.no_grad():
        for name, parameter in reference.named_parameters():
            if name.endswith("bias") or "LayerNorm" in name or ".ln." in name:
                parameter.add_(0.02 * torch.randn(parameter.shape))  # else zeros and ones, whose places cannot be told
    with device.single_process():
        bert = PackedBert(network, Layout())
        copy_whole(bert, to_ours(reference.state_dict(), network))
    pack, padded, real = cells_of(lengths)
    with device.single_process(), torch.inference_mode():
        ours = bert.eval().logits(bert.encode(pack))[:, : network.vocabulary_size]
    with torch.inference_mode():
        expected = reference(padded, attention_mask=real.long()).logits[real]
    assert expected.std() > 0.01
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["geneformer_v1_10m", "geneformer_10m"])
def test_the_smallest_two_layers_deep(name):
    check(published(name, layers=2), (31, 7, 2))


@pytest.mark.exhaustive
@pytest.mark.parametrize(("norm", "activation"), VARIANTS, ids=[f"{norm}-LN, {name}" for norm, name in VARIANTS])
@pytest.mark.parametrize("name", NAMES)
def test_two_layers_deep_with_each_norm_and_activation(name, norm, activation):
    check(published(name, layers=2, norm=norm, activation=activation), (120, 31, 7, 2))


@pytest.mark.exhaustive
def test_the_whole_of_geneformer_v1_10m():
    check(published("geneformer_v1_10m", vocabulary_size=25_426), (2048, 700, 1))
