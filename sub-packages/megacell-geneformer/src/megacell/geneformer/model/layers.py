# SPDX-License-Identifier: Apache-2.0
"""Which modules make up one transformer layer: Megatron-core's own, with our packed attention in its slot."""

import copy


def layer_spec():
    """Return the pre-LN layer as a Megatron-core ``ModuleSpec``."""
    from megatron.core.models.bert.bert_layer_specs import bert_layer_local_spec

    from megacell.geneformer.model.attention import PackedAttention

    spec = copy.deepcopy(bert_layer_local_spec)
    spec.submodules.self_attention.submodules.core_attention = PackedAttention
    return spec
