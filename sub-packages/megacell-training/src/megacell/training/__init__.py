# SPDX-License-Identifier: Apache-2.0
"""Training on Megatron under NeMo, of any network that a family brings. It knows no cell, gene or token."""
