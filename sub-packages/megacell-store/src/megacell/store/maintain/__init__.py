# SPDX-License-Identifier: Apache-2.0
"""A store over its life: compaction, pruning, export to BioNeMo's SCDL."""
