# SPDX-License-Identifier: Apache-2.0
"""Files that may come from anybody: looked at before anything is made of them, in bounded time and memory."""
