"""The key by which the nodes of a cluster recognise each other.

    key = scrypt(cluster_secret)                          if there is one
        = scrypt(key_secret, redis_password)              else

scrypt is slow on purpose: whoever has recorded a handshake must run it for every guess at a weak
secret. Without any secret the key is the same for everybody, so that is allowed on loopback only.
"""

from __future__ import annotations

import hashlib
from functools import lru_cache

KEY_BYTES = 32
_SALT = b"flexkv cluster"
"""The same everywhere: nodes must derive the same key from the secrets alone."""
_SCRYPT_N, _SCRYPT_R = 1 << 14, 8
_SCRYPT_BYTES_MAX = 32 << 20


@lru_cache(maxsize=16)
def cluster_key(cluster_secret: str, key_secret: str = "", redis_password: str = "") -> bytes:
    """Return the key of a cluster; the first call for it takes a tenth of a second."""
    purpose, secrets = b"own", [cluster_secret]
    if not cluster_secret:
        purpose, secrets = b"derived", [key_secret, redis_password]
    told = [purpose, *(secret.encode() for secret in secrets)]
    return hashlib.scrypt(
        b"".join(len(each).to_bytes(4, "little") + each for each in told),
        salt=_SALT,
        n=_SCRYPT_N,
        r=_SCRYPT_R,
        p=1,
        maxmem=_SCRYPT_BYTES_MAX,
        dklen=KEY_BYTES,
    )
