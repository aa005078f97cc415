# SPDX-License-Identifier: Apache-2.0
"""Pretraining under NeMo: entry, module, Megatron strategy, checkpoints, metrics."""
