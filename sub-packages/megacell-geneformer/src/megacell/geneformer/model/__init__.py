# SPDX-License-Identifier: Apache-2.0
"""The Geneformer network: Megatron-core's BERT over packed cells. No training in here."""
