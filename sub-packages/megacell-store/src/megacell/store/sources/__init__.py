# SPDX-License-Identifier: Apache-2.0
"""One file per input format; each gives blocks of counts, obs and gene ids."""
