# SPDX-License-Identifier: Apache-2.0
"""`megacell demo`: the whole path on real cells."""
