# SPDX-License-Identifier: Apache-2.0
"""What every package of Megacell stands on: errors, whole files, progress, what a machine has. No numpy at import."""
