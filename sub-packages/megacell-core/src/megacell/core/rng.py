# SPDX-License-Identifier: Apache-2.0
"""Philox4x32-10, a counter-based generator of random numbers: a keyed function of a counter, without a state.

After Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3" (SC11).
"""

from functools import lru_cache
from typing import Any

import numpy as np

from megacell.core.errors import UsageError
from megacell.core.jit import compiled, inlined

TRAINING, VALIDATION, ORDER = 0, 1, 2  # streams of random numbers that never meet
_M0, _M1 = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)  # Philox's multipliers and Weyl increments
_W0, _W1 = np.uint32(0x9E3779B9), np.uint32(0xBB67AE85)
_HALF = np.uint64(32)


@inlined
def philox(c0: Any, c1: Any, c2: Any, c3: Any, k0: Any, k1: Any) -> tuple[Any, Any, Any, Any]:
    """Return the four words of Philox4x32-10; counter and key are uint32."""
    for _ in range(10):
        p0 = _M0 * np.uint64(c0)
        p1 = _M1 * np.uint64(c2)
        c0, c1, c2, c3 = (
            np.uint32(p1 >> _HALF) ^ c1 ^ k0,
            np.uint32(p1),
            np.uint32(p0 >> _HALF) ^ c3 ^ k1,
            np.uint32(p0),
        )
        k0 = np.uint32(k0 + _W0)
        k1 = np.uint32(k1 + _W1)
    return c0, c1, c2, c3


@compiled
def philox_words(counter: np.ndarray, key: np.ndarray) -> np.ndarray:
    """Return Philox's four words, uint32 [4], for a counter, uint32 [4], and a key, uint32 [2]."""
    return np.array(philox(counter[0], counter[1], counter[2], counter[3], key[0], key[1]), dtype=np.uint32)


def stream_key(seed: int, epoch: int, stream: int) -> np.ndarray:
    """Return the key, uint32 [2], of one stream (`TRAINING`, `VALIDATION`, `ORDER`) in one epoch.

    Raises
    ------
    UsageError
        The seed is not within 0 … 2^64 - 1.
    """
    if not 0 <= seed < 2**64:
        raise UsageError(f"seed {seed}: give a whole number from 0 to 2^64 - 1")
    return np.array(_stream_key(seed, epoch, stream), np.uint32)


@lru_cache(maxsize=1024)
def _stream_key(seed: int, epoch: int, stream: int) -> tuple[int, ...]:
    counter = np.array([epoch & 0xFFFFFFFF, epoch >> 32, stream, 0], dtype=np.uint32)
    words = philox_words(counter, np.array([seed & 0xFFFFFFFF, seed >> 32], dtype=np.uint32))
    return tuple(words[:2].tolist())
