# SPDX-License-Identifier: Apache-2.0
"""Training's sub-commands of `megacell`."""
