# SPDX-License-Identifier: Apache-2.0
"""The store's sub-commands of `megacell`."""
