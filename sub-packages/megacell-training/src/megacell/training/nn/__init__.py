# SPDX-License-Identifier: Apache-2.0
"""What every family's network is made of: packed attention and its kernels, layers, weights, losses."""
