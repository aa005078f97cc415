# SPDX-License-Identifier: Apache-2.0
"""Pages about runs and cells."""
