# SPDX-License-Identifier: Apache-2.0
"""From a store to rows: cells by number, views, queries, graphs, overlaps."""
