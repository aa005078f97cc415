# SPDX-License-Identifier: Apache-2.0
"""What every package of Megacell stands on: errors, whole files, progress, what a machine has.

The command line imports no numpy: `errors`, `files`, `findings`, `versions`, `machine`, `progress` and `cli` do not.
"""
