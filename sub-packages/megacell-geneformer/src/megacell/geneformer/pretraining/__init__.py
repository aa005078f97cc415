# SPDX-License-Identifier: Apache-2.0
"""Geneformer as a model family that `megacell.training` trains."""
