# SPDX-License-Identifier: Apache-2.0
"""Geneformer's sub-commands of `megacell`."""
