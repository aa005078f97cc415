# SPDX-License-Identifier: Apache-2.0
"""The README.md of an exported model: what it is, what it was trained on, and how well it does beside no network."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # it brings NeMo with it
    from megacell.geneformer.model.geneformer_model import GeneformerModel

_CARD = """\
---
library_name: transformers
pipeline_tag: fill-mask
tags: [single-cell, biology, geneformer, megacell]
---

# {name}

A Geneformer-style model of single cells: {layers} layers, hidden size {hidden}, {heads} heads, {parameters:,}
parameters, cells of up to {max_length:,} tokens. Written by Megacell; for research, not for diagnosis.

    from transformers import {architecture}
    model = {architecture}.from_pretrained("THIS_FOLDER")

A cell is its genes by descending count / cell total x 10,000 / gene median, as tokens. The dictionaries are in
`vocabulary/` (Megacell's) and `token_dictionary.pkl`, `gene_median_dictionary.pkl` (as Geneformer's tokenizer reads
them); another dictionary gives wrong answers without an error.

| | |
|---|---|
{rows}
"""


def model_card(model: "GeneformerModel", architecture: str, figures: Mapping[str, Any]) -> str:
    """Return the text of a model card.

    Parameters
    ----------
    model : GeneformerModel
    architecture : str
        Hugging Face's class.
    figures : mapping
        Of the training, by what they are.
    """
    sizes, vocabulary = model.sizes, model.vocabulary
    provenance = dict(model.cfg.get("provenance") or {})
    facts: dict[str, Any] = {
        "vocabulary": f"{vocabulary.name}, {len(vocabulary.gene_ids):,} genes, sha256 `{vocabulary.hash}`",
        "normalisation": f"{sizes.norm}-LN, {sizes.activation}",
        "optimizer steps": provenance.get("step"),
    }
    if store := provenance.get("store"):
        facts["trained on"] = f"{store['cells']:,} cells (store generation {store['generation']}, `{store['digest']}`)"
    if origin := provenance.get("from"):
        facts["imported from"] = origin
    if data := provenance.get("data"):
        facts["masking"] = ", ".join(f"{name} {value}" for name, value in data["masking"].items())
    facts |= figures
    rows = "\n".join(f"| {name} | {value} |" for name, value in facts.items() if value is not None)
    parameters = sum(parameter.numel() for parameter in model.bert.parameters())
    return _CARD.format(
        name=vocabulary.name, layers=sizes.layers, hidden=sizes.hidden, heads=sizes.heads, parameters=parameters,
        max_length=sizes.max_length, architecture=architecture, rows=rows,
    )  # fmt: skip
