# SPDX-License-Identifier: Apache-2.0
"""What a model is compared with: baselines that need no network."""
