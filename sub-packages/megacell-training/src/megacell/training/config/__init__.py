# SPDX-License-Identifier: Apache-2.0
"""A run's settings: composed by Hydra from the groups of training and of the family."""
