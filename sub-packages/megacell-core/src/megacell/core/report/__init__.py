# SPDX-License-Identifier: Apache-2.0
"""Pages of HTML without scripts, and charts on them."""
