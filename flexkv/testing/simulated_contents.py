"""What the blocks of a simulation contain: their keys, changed by the generation of the weights.

A clear of everything stands for new weights: from then on, blocks of the same keys have other
bytes. So the bytes of a block say whether it was computed before a clear. In generation 0, the
content of a block is its key.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from flexkv.common.terms import BLOCK_KEY_BYTES, BlockKey

_EACH_BYTE = int.from_bytes(b"\1" * BLOCK_KEY_BYTES, "little")


def content_of(key: BlockKey, generation: int) -> NDArray[np.uint8]:
    """Return the right content of a block in a generation: uint8[16]."""
    assert generation < 256, generation
    return np.frombuffer(key, np.uint8) ^ np.uint8(generation)


def generation_of(key: BlockKey, content: NDArray[np.uint8]) -> int | None:
    """Return the generation in which this is the content of a block; None if it is in none."""
    changed = int.from_bytes(key, "little") ^ int.from_bytes(content.tobytes(), "little")
    generation = changed & 255
    return generation if changed == generation * _EACH_BYTE else None
