# SPDX-License-Identifier: Apache-2.0
"""Files that hold models: archives that are safe to open, .nemo, checked tensors."""
