# SPDX-License-Identifier: Apache-2.0
"""Models in and out of Megacell: .nemo archives, and the one way to open a trained model."""
