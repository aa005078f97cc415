# SPDX-License-Identifier: Apache-2.0
"""What lies on disk: manifest, shards, genes, metadata, graphs; and how it is verified."""
