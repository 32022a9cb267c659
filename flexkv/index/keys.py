"""Block keys: 128-bit chained hashes over a secret, a fingerprint, a namespace and the tokens.

    root   = H(secret ‖ fingerprint ‖ namespace parts)     each part behind its length
    key[0] = H(root ‖ tokens of block 0)
    key[i] = H(key[i-1] ‖ tokens of block i)

H is XXH3-128. Tokens take four bytes each, little-endian, or eight where one of the block needs
more. Before a block that an extra key touches, its parent is replaced by H(parent ‖ those extra
keys, each with its range relative to the block). `docs/key-vectors.json` has examples.

The fingerprint holds everything that changes the bytes of a block, so that two
models never share one; the same prompt gives the same keys in every process and after every
restart.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from flexkv import _ext
from flexkv.common.config import ModelConfig
from flexkv.common.errors import ConfigError
from flexkv.common.layout import Order, is_natural
from flexkv.common.terms import BLOCK_KEY_BYTES, BlockKey

KEY_VERSION = 2
"""Changes whenever the same tokens would give other keys or other bytes."""


class Scope(NamedTuple):
    """What besides its tokens a prompt's KV hangs on; may be given wherever a namespace may."""

    parts: tuple[str, ...] = ()
    """The namespace: LoRA adapter, tenant's salt, anything."""
    extra_keys: tuple[tuple[int, int, str], ...] = ()
    """(first token, last token exclusive, content hash): what stands behind placeholder tokens."""


Namespace = str | Sequence[str] | Scope | None


class KeyChain:
    """Gives the keys of prompts for one model, block size and secret."""

    def __init__(
        self, model: ModelConfig, tokens_per_block: int, secret: str = "", order: Order = ""
    ) -> None:
        """Take what keys hang on; `order` is that of a block's elements, empty for the natural."""
        self._tokens_per_block = tokens_per_block
        self.fingerprint = fingerprint(model, tokens_per_block, order)
        prefix = _framed([secret.encode(), self.fingerprint])
        self._root = lru_cache(maxsize=4096)(
            lambda parts: _ext.hash128(prefix + _framed([part.encode() for part in parts]))
        )

    def keys(self, tokens: NDArray[np.int64] | list[int], namespace: Namespace = None) -> bytes:
        """Give the root, and the key of every whole block of `tokens`: 16 bytes each.

        Raises:
            ConfigError: a token is negative or no integer, or the namespace is not what it may be.
        """
        scope = scope_of(namespace)
        root = self._root(scope.parts)
        try:
            if scope.extra_keys:
                return self._keys_with_extras(tokens, root, scope.extra_keys)
            return _ext.chain_keys(tokens, self._tokens_per_block, root)
        except ValueError as error:
            index, token = error.args
            raise ConfigError(f"token_ids[{index}]", token, "must not be negative") from error
        except (TypeError, OverflowError) as error:
            raise ConfigError("token_ids", "a list", f"must be integers: {error}") from error

    def extend(self, keys: bytes, tokens: NDArray[np.int64]) -> bytes:
        """Give the keys of a prompt that has grown, hashing only its new blocks.

        Args:
            keys: root and keys of its first whole blocks, under a namespace without extra keys.
            tokens: int64[n], the whole prompt, which begins with the tokens of those blocks.
        """
        known_blocks = len(keys) // BLOCK_KEY_BYTES - 1
        return self.grown(keys, tokens[known_blocks * self._tokens_per_block :])

    def grown(self, keys: bytes, new_tokens: NDArray[np.int64] | list[int]) -> bytes:
        """Give the keys of a prompt that has grown.

        Args:
            keys: root and keys of its whole blocks, under a namespace without extra keys.
            new_tokens: what came behind those blocks; what fills no block is left out.
        """
        known = len(keys) - BLOCK_KEY_BYTES
        return keys[:known] + _ext.chain_keys(new_tokens, self._tokens_per_block, keys[known:])

    def _keys_with_extras(
        self,
        tokens: NDArray[np.int64] | list[int],
        root: bytes,
        extra_keys: tuple[tuple[int, int, str], ...],
    ) -> bytes:
        """Chain block by block where extra keys are, and in one go between them."""
        per_block, size = self._tokens_per_block, BLOCK_KEY_BYTES
        blocks = len(tokens) // per_block
        touched: dict[int, list[tuple[int, int, str]]] = {}
        for first, last, text in sorted(extra_keys):
            for block in range(first // per_block, min(blocks, -(-last // per_block))):
                start = block * per_block
                touched.setdefault(block, []).append((first - start, last - start, text))
        keys, done = root, 0
        for block in (*sorted(touched), blocks):
            between = tokens[done * per_block : block * per_block]
            keys += _ext.chain_keys(between, per_block, keys[-size:])[size:]
            if block < blocks:
                parent = _ext.hash128(keys[-size:] + _framed_extras(touched[block]))
                own = tokens[block * per_block : (block + 1) * per_block]
                keys += _ext.chain_keys(own, per_block, parent)[size:]
            done = block + 1
        _ext.chain_keys(tokens[blocks * per_block :], per_block, root)  # checks the tail
        return keys

    def root(self, namespace: Namespace = None) -> bytes:
        """Give the root of a namespace, under which all its blocks are."""
        return self._root(scope_of(namespace).parts)

    def namespace_hash(self, namespace: Namespace) -> str:
        """Give a short name of a namespace that does not tell it; empty for none."""
        if namespace is None:
            return ""
        parts = scope_of(namespace).parts
        return self._root(parts)[:4].hex() if parts else ""


def key_list(keys: bytes) -> list[BlockKey]:
    """Give keys that stand one behind the other."""
    step = BLOCK_KEY_BYTES
    return [keys[at : at + step] for at in range(0, len(keys), step)]


def block_keys(keys: bytes) -> list[BlockKey]:
    """Give the key of each block of a prompt, without the root."""
    return key_list(keys[BLOCK_KEY_BYTES:])


def fingerprint(model: ModelConfig, tokens_per_block: int, order: Order = "") -> bytes:
    """Name everything that changes the bytes of a block, one `name=value` after the other."""
    facts = _facts(model, tokens_per_block)
    if not is_natural(order):
        facts["order"] = order
    return ";".join(f"{name}={value}" for name, value in facts.items()).encode()


def blocks_are(model: ModelConfig, tokens_per_block: int, secret: str) -> dict[str, int | str]:
    """Tell what blocks are and under which keys, for who keeps them; not the secret itself."""
    digest = _ext.hash128(_framed([b"secret", secret.encode()])).hex()
    return {**_facts(model, tokens_per_block), "key_secret_digest": digest}


def _facts(model: ModelConfig, tokens_per_block: int) -> dict[str, int | str]:
    # What is as it is for most models is not named, so that their keys stay what they were.
    rest: dict[str, int | str] = {}
    if model.parts > 1:
        rest["parts"] = model.parts
    if model.layer_groups:
        rest["layer_groups"] = repr(model.layer_groups)
    return {
        "key_version": KEY_VERSION,
        "model_id": model.model_id,
        "num_layers": model.num_layers,
        "num_kv_heads": model.num_kv_heads,
        "head_size": model.head_size,
        "kv_dim": model.kv_dim,
        "dtype": model.dtype,
        "tokens_per_block": tokens_per_block,
        **rest,
    }


_NOWHERE = Scope()


def scope_of(namespace: Namespace) -> Scope:
    """Give a namespace as a scope; an absent one is empty, a string is one part.

    Raises:
        ConfigError: a part is not a string, or an extra key's range is none.
    """
    if namespace is None:
        return _NOWHERE
    if isinstance(namespace, Scope):
        for first, last, text in namespace.extra_keys:
            if not 0 <= first < last or not isinstance(text, str):
                why = "must be (first token, later token, string)"
                raise ConfigError("namespace.extra_keys", (first, last, text), why)
        return Scope(_parts(namespace.parts), tuple(namespace.extra_keys))
    return Scope(_parts(namespace))


def _parts(namespace: str | Sequence[str]) -> tuple[str, ...]:
    parts = (namespace,) if isinstance(namespace, str) else namespace
    if not isinstance(parts, Sequence) or not all(isinstance(part, str) for part in parts):
        raise ConfigError("namespace", namespace, "must be a string or a list of strings")
    try:
        "".join(parts).encode()
    except UnicodeEncodeError as error:
        raise ConfigError("namespace", ascii(namespace), f"is not UTF-8: {error.reason}") from error
    return tuple(parts)


def _framed_extras(extras: list[tuple[int, int, str]]) -> bytes:
    return _framed([f"{first}:{last}:{text}".encode() for first, last, text in extras])


def _framed(parts: Sequence[bytes]) -> bytes:
    """Join parts, each behind its length, so that no two lists of parts give the same bytes."""
    return b"".join(len(part).to_bytes(8, "little") + part for part in parts)
