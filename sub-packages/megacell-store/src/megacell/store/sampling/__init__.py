# SPDX-License-Identifier: Apache-2.0
"""Which cells, in which order, on which rank. No gene and no token in it: a family hands it a collator."""
