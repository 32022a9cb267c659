"""Mooncake's error codes, as far as they make a difference here."""

from __future__ import annotations

NO_SPACE = -200
"""The master has no room for the object now."""
NOT_READY, NOT_FOUND, EXISTS, HAS_LEASE = -703, -704, -705, -706
LEASE_EXPIRED = -707
"""The bytes were moved, but may have been overwritten meanwhile: it took too long."""
REFUSED = -600
"""An argument is wrong, such as a place that is too small for the object."""
NO_MASTER = -900
"""The master does not answer."""
READ_FAILED = -1
"""Blocks of another node were not read, or not all."""

CLEAN = frozenset(
    {NO_SPACE, NOT_READY, NOT_FOUND, EXISTS, HAS_LEASE, LEASE_EXPIRED, REFUSED, NO_MASTER}
)
"""Errors after which Mooncake moves no bytes any more. After others, it may go on for a while."""

_REASONS = {
    NO_SPACE: "the store has no room for it now",
    NO_MASTER: "its master does not answer",
    LEASE_EXPIRED: "it took longer than the object's lease",
    -800: "the transfer failed",
}


def reason(code: int) -> str:
    """Return why a request failed."""
    return f"{_REASONS.get(code, 'Mooncake refuses it')} (code {code})"
