"""Block keys: 128-bit chained hashes over a secret, a fingerprint, a namespace and the tokens.

    root   = N(fingerprint ‖ namespace parts)              each part after its length
    key[0] = H(root ‖ tokens of block 0)
    key[i] = H(key[i-1] ‖ tokens of block i)

N is BLAKE2b-128 with a key, and H is XXH3-128 with constants; key and constants are derived from
the secret (`secret.py`). Tokens take four bytes each, little-endian. For a block that an extra key
touches, the parent is replaced by N(parent ‖ those extra keys, each with its range relative to the
block). `docs/key-vectors.json` has examples.

The fingerprint holds the facts of the block space: everything that changes the bytes of a block, so
that two models never share one. The same prompt has the same keys in every process and after every
restart.

A block of a KV group g > 0 is a leaf. Its parent is the chain's block that ends where it ends:

    leaf key = key of the parent XOR XXH3-128("flexkv leaf", seed g)     in canonical byte order

The fingerprint describes all groups of a model, so a group's number is enough to tell its leaves
from those of others.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from flexkv import _ext
from flexkv.common.arguments import integer, text
from flexkv.common.config_keys import kind_of
from flexkv.common.errors import ConfigError
from flexkv.common.layout import Order, is_natural
from flexkv.common.space import GROUPS_MAX, BlockSpace
from flexkv.common.terms import BLOCK_KEY_BYTES, BlockKey
from flexkv.index.secret import derived

KEY_VERSION = 3
"""Changes whenever the same tokens would give other keys or other bytes."""

_ROOT, _EXTRAS = b"flexkv root", b"flexkv extras"
"""What N names: this keeps roots and extra keys apart."""
_LEAF = b"flexkv leaf"


class Scope(NamedTuple):
    """What a prompt's KV depends on besides its tokens; accepted wherever a namespace is."""

    parts: tuple[str, ...] = ()
    """The namespace: LoRA adapter, tenant's salt, anything."""
    extra_keys: tuple[tuple[int, int, str], ...] = ()
    """(first token, last token exclusive, hash of the content) for each run of placeholders."""


Namespace = str | Sequence[str] | Scope | None


class KeyChain:
    """Derives the keys of prompts for one block space and secret."""

    def __init__(self, space: BlockSpace, secret: str = "", order: Order = "") -> None:
        """Derive the hash constants; `order` is of a block's elements, empty if it is natural."""
        self.tokens_per_block = space.tokens_per_block
        self.fingerprint = fingerprint(space, order)
        self._hash_secret, self._name_key, _ = derived(secret)
        self._root = lru_cache(maxsize=4096)(self._named_root)

    def keys(self, tokens: NDArray[np.int64] | list[int], namespace: Namespace = None) -> bytes:
        """Return the root, and the key of every whole block of `tokens`: 16 bytes each.

        Raises:
            ConfigError: a token is not an integer from 0 to 2**32 - 1, or the namespace breaks
                a rule.
        """
        scope = scope_of(namespace)
        root = self._root(scope.parts)
        if scope.extra_keys:
            return self._keys_with_extras(tokens, root, scope.extra_keys)
        return self._chain(tokens, root)

    def extend(self, keys: bytes, tokens: NDArray[np.int64]) -> bytes:
        """Return the keys of a prompt that has grown, hashing only its new blocks.

        Args:
            keys: root and keys of its first whole blocks, under a namespace without extra keys.
            tokens: int64[n], the whole prompt, which begins with the tokens of those blocks.
        """
        known = (len(keys) // BLOCK_KEY_BYTES - 1) * self.tokens_per_block
        return self.grown(keys, tokens[known:])

    def grown(self, keys: bytes, new_tokens: NDArray[np.int64] | list[int]) -> bytes:
        """Return the keys of a prompt that has grown.

        Args:
            keys: root and keys of its whole blocks, under a namespace without extra keys.
            new_tokens: the tokens behind those blocks; a last block that is not whole has no key.

        Raises:
            ConfigError: a token is not an integer from 0 to 2**32 - 1; the error has its index.
        """
        known = len(keys) - BLOCK_KEY_BYTES
        first = known // BLOCK_KEY_BYTES * self.tokens_per_block
        return keys[:known] + self._chain(new_tokens, keys[known:], first)

    def extend_in_place(self, keys: bytearray, new_tokens: NDArray[np.int64] | list[int]) -> None:
        """Append the keys of a prompt's new blocks to `keys`; for the rest see `grown`."""
        known = len(keys) - BLOCK_KEY_BYTES
        first = known // BLOCK_KEY_BYTES * self.tokens_per_block
        keys += self._chain(new_tokens, bytes(keys[known:]), first)[BLOCK_KEY_BYTES:]

    def _chain(self, tokens: NDArray[np.int64] | list[int], parent: bytes, first: int = 0) -> bytes:
        """Return a parent and the keys of the blocks behind it; `first` is the first token's index.

        Raises:
            ConfigError: a token is not an integer from 0 to 2**32 - 1.
        """
        try:
            return _ext.chain_keys(tokens, self.tokens_per_block, parent, self._hash_secret)
        except ValueError as error:
            match error.args:
                case (int(index), token):
                    why = "must be from 0 to 2**32 - 1"
                    raise ConfigError(f"token_ids[{first + index}]", token, why) from error
            raise ConfigError("token_ids", type(tokens).__name__, str(error)) from error
        except (TypeError, BufferError) as error:
            kind = type(tokens).__name__
            raise ConfigError("token_ids", kind, f"must be integers: {error}") from error

    def _named_root(self, parts: tuple[str, ...]) -> bytes:
        return self._named(_ROOT, [self.fingerprint, *(part.encode() for part in parts)])

    def _named(self, kind: bytes, parts: Sequence[bytes]) -> bytes:
        """Return 16 bytes that identify some parts; nobody without the secret can tell which."""
        return hashlib.blake2b(
            _framed(parts), digest_size=BLOCK_KEY_BYTES, key=self._name_key, person=kind
        ).digest()

    def _keys_with_extras(
        self,
        tokens: NDArray[np.int64] | list[int],
        root: bytes,
        extra_keys: tuple[tuple[int, int, str], ...],
    ) -> bytes:
        """Return the keys, chained block by block where extra keys are, in one go between them."""
        per_block, size = self.tokens_per_block, BLOCK_KEY_BYTES
        blocks = len(tokens) // per_block
        touched: dict[int, list[tuple[int, int, str]]] = {}
        for first, last, name in sorted(extra_keys):
            for block in range(first // per_block, min(blocks, -(-last // per_block))):
                start = block * per_block
                touched.setdefault(block, []).append((first - start, last - start, name))
        keys, done = root, 0
        for block in (*sorted(touched), blocks):
            between = tokens[done * per_block : block * per_block]
            keys += self._chain(between, keys[-size:], done * per_block)[size:]
            if block < blocks:
                parent = self._named(_EXTRAS, [keys[-size:], *map(_as_bytes, touched[block])])
                own = tokens[block * per_block : (block + 1) * per_block]
                keys += self._chain(own, parent, block * per_block)[size:]
            done = block + 1
        self._chain(tokens[blocks * per_block :], root, blocks * per_block)  # checks the tail
        return keys

    def root(self, namespace: Namespace = None) -> bytes:
        """Return the root of a namespace, the start of all its blocks' chains."""
        return self._root(scope_of(namespace).parts)

    def namespace_hash(self, namespace: Namespace) -> str:
        """Return a short name of a namespace that does not reveal it; empty for none."""
        if namespace is None:
            return ""
        parts = scope_of(namespace).parts
        return self._root(parts)[:4].hex() if parts else ""


def key_list(keys: bytes) -> list[BlockKey]:
    """Return the keys in a buffer as a list."""
    step = BLOCK_KEY_BYTES
    return [keys[at : at + step] for at in range(0, len(keys), step)]


def block_keys(keys: bytes) -> list[BlockKey]:
    """Return the key of each block of a prompt, without the root."""
    return key_list(keys[BLOCK_KEY_BYTES:])


def leaf_keys(keys: bytes, group: int) -> bytes:
    """Return the root, and for each block of a prompt the key of a group's leaf that ends there.

    Args:
        keys: the root and the keys of the blocks: 16 bytes each.
        group: the number of the KV group; the leaves of group 0 are the blocks themselves.
    """
    words = np.frombuffer(keys, np.uint64).reshape(-1, 2) ^ leaf_salt(group)
    return keys[:BLOCK_KEY_BYTES] + words[1:].tobytes()


def chain_keys_of(keys: bytes, group: int) -> bytes:
    """Return the keys of a prompt's blocks, from what `leaf_keys` returns for a group."""
    return leaf_keys(keys, group)  # the second XOR undoes the first


def leaf_keys_at(keys: bytes, group: int, positions: NDArray[np.int64]) -> bytes:
    """Return the keys of a group's leaves at some positions of a prompt."""
    words = np.frombuffer(keys, np.uint64).reshape(-1, 2)
    return (words[positions + 1] ^ leaf_salt(group)).tobytes()


@lru_cache(GROUPS_MAX)
def leaf_salt(group: int) -> NDArray[np.uint64]:
    """Return what a block's key is XORed with to get the key of its leaf: uint64[2]."""
    salt = _ext.hash128(_LEAF, group) if group else bytes(BLOCK_KEY_BYTES)
    return np.frombuffer(salt, np.uint64)


def fingerprint(space: BlockSpace, order: Order = "") -> bytes:
    """Return everything that changes the bytes of a block, as `name=value` pairs joined by `;`."""
    facts = _facts(space)
    if not is_natural(order):
        facts["order"] = order
    return ";".join(f"{name}={value}" for name, value in facts.items()).encode()


def block_identity(spaces: Sequence[BlockSpace], secret: str) -> dict[str, int | str]:
    """Return what determines blocks and their keys, to store with them; without the secret."""
    others = {f"group_{space.group}": fingerprint(space).decode() for space in spaces[1:]}
    return {**_facts(spaces[0]), **others, "key_secret_digest": derived(secret).digest}


def _facts(space: BlockSpace) -> dict[str, int | str]:
    facts: dict[str, int | str] = {"key_version": KEY_VERSION, **space.facts}
    if space.group:  # keys are derived from group 0, whose facts name all groups
        facts["group"] = space.group
    return facts


_NOWHERE = Scope()


def scope_of(namespace: Namespace) -> Scope:
    """Return a namespace as a scope; None is an empty scope, a string is one part.

    Raises:
        ConfigError: a part is not a string, or an extra key is malformed.
    """
    if namespace is None:
        return _NOWHERE
    if isinstance(namespace, Scope):
        return Scope(_parts(namespace.parts), _extra_keys(namespace.extra_keys))
    return Scope(_parts(namespace))


def _extra_keys(given: Any) -> tuple[tuple[int, int, str], ...]:
    """Return extra keys with all integers converted to Python's.

    Raises:
        ConfigError: one is not (first token, later token, string).
    """
    field, why = "namespace.extra_keys", "must be (first, last, string) with 0 <= first < last"
    if isinstance(given, str | bytes) or not isinstance(given, Sequence):
        raise ConfigError(field, kind_of(given), "must be a list of (first, last, string)")
    found = []
    for number, each in enumerate(given):
        if not isinstance(each, tuple | list) or len(each) != 3:
            raise ConfigError(f"{field}[{number}]", kind_of(each), why)
        first, last = (integer(f"{field}[{number}]", token) for token in each[:2])
        if not 0 <= first < last:
            raise ConfigError(f"{field}[{number}]", (first, last), why)
        found.append((first, last, text(f"{field}[{number}]", each[2])))
    return tuple(found)


def _parts(namespace: str | Sequence[str]) -> tuple[str, ...]:
    parts = (namespace,) if isinstance(namespace, str) else namespace
    if not isinstance(parts, Sequence) or not all(isinstance(part, str) for part in parts):
        raise ConfigError("namespace", kind_of(namespace), "must be a string or a list of strings")
    try:
        "".join(parts).encode()
    except UnicodeEncodeError as error:
        why = f"cannot be encoded as UTF-8: {error.reason}"
        raise ConfigError("namespace", ascii(namespace), why) from error
    return tuple(parts)


def _as_bytes(extra_key: tuple[int, int, str]) -> bytes:
    first, last, text = extra_key
    return f"{first}:{last}:{text}".encode()


def _framed(parts: Sequence[bytes]) -> bytes:
    """Return the parts joined, each after its length: no two lists of parts give the same bytes."""
    return b"".join(len(part).to_bytes(8, "little") + part for part in parts)
