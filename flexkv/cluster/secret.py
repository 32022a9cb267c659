"""The key by which the nodes of a cluster recognise each other.

    key = scrypt(cluster_secret)                          if there is one
        = scrypt(key_secret, redis_password)              else

scrypt is slow on purpose: whoever has recorded a handshake must run it for every guess at a weak
secret. Without any secret the key is the same for everybody, so that is allowed on loopback only.
"""

from __future__ import annotations

from functools import lru_cache

from flexkv.index.secret import stretched

KEY_BYTES = 32
_SALT = b"flexkv cluster"
"""The same everywhere: nodes must derive the same key from the secrets alone."""


@lru_cache(maxsize=16)
def cluster_key(cluster_secret: str, key_secret: str = "", redis_password: str = "") -> bytes:
    """Return the key of a cluster; the first call for it takes a tenth of a second."""
    purpose, secrets = b"own", [cluster_secret]
    if not cluster_secret:
        purpose, secrets = b"derived", [key_secret, redis_password]
    told = [purpose, *(secret.encode() for secret in secrets)]
    joined = b"".join(len(each).to_bytes(4, "little") + each for each in told)
    return stretched(joined, _SALT, KEY_BYTES)
