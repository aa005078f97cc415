# SPDX-License-Identifier: Apache-2.0
"""Devices, processes, Slurm, signals, and Lightning's strategy over Megatron."""
