# SPDX-License-Identifier: Apache-2.0
"""From files to a store: inspect, plan, write shards, publish."""
