# SPDX-License-Identifier: Apache-2.0
"""Checkpoints: written in the background, whole or not there, opened at any number of ranks."""
