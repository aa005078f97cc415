# SPDX-License-Identifier: Apache-2.0
"""Held-out loss beside baselines."""
