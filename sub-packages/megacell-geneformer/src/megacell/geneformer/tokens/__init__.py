# SPDX-License-Identifier: Apache-2.0
"""From counts to tokens: rank value encoding, masking, packing, tokenised corpora."""
