# SPDX-License-Identifier: Apache-2.0
"""Genes, tokens and medians: built from stores, merged, imported."""
