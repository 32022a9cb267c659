"""What is derived from `key_secret`: the constants of the keys' hash, and a digest to compare.

    master = scrypt(secret)                    zeros without a secret
    each   = SHAKE-256("flexkv" ‖ what it is for ‖ master)

scrypt is slow on purpose: whoever can read a key, or the digest in a superblock or a greeting,
must run it for every guess at a weak secret. A process runs it once for its secret.

XXH3 multiplies its input by constants. With the public ones, anybody can choose tokens for which
a factor is zero, so that two prompts have one key. Constants that nobody else knows leave no such
choice. See `docs/adr/0010-keys-under-a-secret.md` for what is promised, and what is not.
"""

from __future__ import annotations

import hashlib
from functools import lru_cache
from typing import NamedTuple

HASH_SECRET_BYTES = 192
"""As many bytes as XXH3's public constants have."""
_SALT = b"flexkv key_secret"
"""The same everywhere: nodes that share blocks must derive the same keys from the secret alone."""
_SCRYPT_N, _SCRYPT_R = 1 << 14, 8
_SCRYPT_BYTES_MAX = 32 << 20
_MASTER_BYTES = 64


class DerivedSecrets(NamedTuple):
    """What is derived from one secret."""

    hash_secret: bytes
    """192 bytes that take the place of XXH3's public constants."""
    name_key: bytes
    """64 bytes: the key of BLAKE2b for roots and extra keys."""
    digest: str
    """Equal in two processes if they have the same secret."""


def stretched(secret: bytes, salt: bytes, length: int) -> bytes:
    """Return bytes that are made from a secret; it takes a tenth of a second."""
    limits = {"n": _SCRYPT_N, "r": _SCRYPT_R, "p": 1, "maxmem": _SCRYPT_BYTES_MAX}
    return hashlib.scrypt(secret, salt=salt, dklen=length, **limits)


@lru_cache(maxsize=16)
def derived(secret: str) -> DerivedSecrets:
    """Return what is derived from a secret; the first call for it takes a tenth of a second."""
    master = bytes(_MASTER_BYTES)
    if secret:
        master = stretched(secret.encode(), _SALT, _MASTER_BYTES)

    def expand(purpose: bytes, length: int) -> bytes:
        return hashlib.shake_256(b"flexkv " + purpose + b"\0" + master).digest(length)

    return DerivedSecrets(
        expand(b"hash secret", HASH_SECRET_BYTES),
        expand(b"name key", hashlib.blake2b.MAX_KEY_SIZE),
        expand(b"digest", 16).hex(),
    )
