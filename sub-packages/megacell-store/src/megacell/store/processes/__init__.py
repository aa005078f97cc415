# SPDX-License-Identifier: Apache-2.0
"""Worker processes, whose crash is a result like any other."""
