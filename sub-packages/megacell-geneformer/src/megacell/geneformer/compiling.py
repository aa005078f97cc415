# SPDX-License-Identifier: Apache-2.0
"""The one way in which this package compiles a loop."""

from numba import njit

# nogil: a thread may prepare batches while another trains; cache: compiled once a machine; numpy's error model:
# division has no branch for zero, so that loops vectorise. Never fastmath: results are the same on every platform.
compiled = njit(nogil=True, cache=True, error_model="numpy")
