# SPDX-License-Identifier: Apache-2.0
"""A run from its entry to its end: steps, guard, metrics, loggers, sweeps."""
