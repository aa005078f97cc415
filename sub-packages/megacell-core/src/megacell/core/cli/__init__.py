# SPDX-License-Identifier: Apache-2.0
"""The `megacell` command, and the sub-commands that belong to no other package."""
