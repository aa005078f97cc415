# SPDX-License-Identifier: Apache-2.0
"""The measurements of `megacell bench` about tokens, training and embedding."""
