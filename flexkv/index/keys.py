"""Block keys: 128-bit chained hashes over a secret, a fingerprint, a namespace and the tokens.

    root   = H(secret ‖ fingerprint ‖ namespace parts)     each part behind its length
    key[0] = H(root ‖ tokens of block 0)
    key[i] = H(key[i-1] ‖ tokens of block i)

H is XXH3-128. The fingerprint holds everything that changes the bytes of a block, so that two
models never share one; the same prompt gives the same keys in every process and after every
restart.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from flexkv import _ext
from flexkv.common.config import ModelConfig
from flexkv.common.errors import ConfigError
from flexkv.common.terms import BLOCK_KEY_BYTES, BlockKey

KEY_VERSION = 1
"""Changes whenever the same tokens would give other keys or other bytes."""

Namespace = str | Sequence[str] | None


class KeyChain:
    """Gives the keys of prompts for one model, block size and secret."""

    def __init__(self, model: ModelConfig, tokens_per_block: int, secret: str = "") -> None:
        self._tokens_per_block = tokens_per_block
        self.fingerprint = fingerprint(model, tokens_per_block)
        prefix = _framed([secret.encode(), self.fingerprint])
        self._root = lru_cache(maxsize=4096)(
            lambda parts: _ext.hash128(prefix + _framed([part.encode() for part in parts]))
        )

    def keys(self, tokens: NDArray[np.int64], namespace: Namespace = None) -> bytes:
        """Give the root, and the key of every whole block of `tokens`, int64[n]: 16 bytes each.

        Raises:
            ConfigError: a token is negative, or the namespace is not made of strings.
        """
        root = self._root(namespace_parts(namespace))
        try:
            return _ext.chain_keys(tokens, self._tokens_per_block, root)
        except ValueError as error:
            index, token = error.args
            raise ConfigError(f"token_ids[{index}]", token, "must not be negative") from error

    def root(self, namespace: Namespace = None) -> bytes:
        """Give the root of a namespace, under which all its blocks are."""
        return self._root(namespace_parts(namespace))

    def namespace_hash(self, namespace: Namespace) -> str:
        """Give a short name of a namespace that does not tell it; empty for none."""
        parts = namespace_parts(namespace)
        return self._root(parts)[:4].hex() if parts else ""


def block_keys(keys: bytes) -> list[BlockKey]:
    """Give the key of each block, without the root."""
    step = BLOCK_KEY_BYTES
    return [keys[at : at + step] for at in range(step, len(keys), step)]


def fingerprint(model: ModelConfig, tokens_per_block: int) -> bytes:
    """Name everything that changes the bytes of a block, one `name=value` after the other."""
    facts = {
        "key_version": KEY_VERSION,
        "model_id": model.model_id,
        "num_layers": model.num_layers,
        "num_kv_heads": model.num_kv_heads,
        "head_size": model.head_size,
        "kv_dim": model.kv_dim,
        "dtype": model.dtype,
        "tokens_per_block": tokens_per_block,
    }
    return ";".join(f"{name}={value}" for name, value in facts.items()).encode()


def namespace_parts(namespace: Namespace) -> tuple[str, ...]:
    """Give a namespace as a tuple; an absent one is empty, a string is one part.

    Raises:
        ConfigError: a part is not a string.
    """
    if namespace is None:
        return ()
    if isinstance(namespace, str):
        return (namespace,)
    if not isinstance(namespace, Sequence) or not all(isinstance(p, str) for p in namespace):
        raise ConfigError("namespace", namespace, "must be a string or a list of strings")
    return tuple(namespace)


def _framed(parts: Sequence[bytes]) -> bytes:
    """Join parts, each behind its length, so that no two lists of parts give the same bytes."""
    return b"".join(len(part).to_bytes(8, "little") + part for part in parts)
