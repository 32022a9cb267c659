"""Mooncake where both nodes have it, and connections of our own where not, or when it fails.

    the grant came with places ──▶ Mooncake ──the rest, if it failed──▶ TCP
    it did not ──────────────────────────────────────────────────────▶ TCP

Each node listens for connections of our own in any case.
"""

from __future__ import annotations

from flexkv.io.peer.mooncake import MooncakeTransport
from flexkv.io.peer.tcp_transport import TcpTransport
from flexkv.io.peer.transport import Fetched, Part


class PreferredTransport:
    """A transport by Mooncake, with another one for what Mooncake does not bring.

    Attributes:
        fallbacks: how many reads were made by the other one.
    """

    name = "mooncake"

    def __init__(self, mooncake: MooncakeTransport, tcp: TcpTransport) -> None:
        """Take both; they are closed with this."""
        self._mooncake, self._tcp = mooncake, tcp
        self._is_stopped = False
        self.fallbacks = 0

    def connect(self) -> None:
        """Attach to the running loop."""
        self._mooncake.connect()
        self._tcp.connect()

    def wants_places(self, holder: int) -> bool:
        """Return whether it would use the places of a holder's blocks now."""
        return self._mooncake.wants_places(holder)

    async def fetch(self, part: Part) -> Fetched:
        """Read blocks into host blocks; see `Transport`.

        Wrong sums do not prove that the holder has wrong bytes: its engine may have been started
        again meanwhile, with its memory at other addresses.
        """
        if part.places is not None:
            brought = await self._mooncake.fetch(part)
            if brought.error is None or self._is_stopped:
                return brought
        self.fallbacks += 1
        return await self._tcp.fetch(part)

    def stop(self, holder: int | None = None) -> None:
        """Make what is being read from a holder, or from all, fail soon."""
        self._is_stopped = self._is_stopped or holder is None
        self._mooncake.stop(holder)
        self._tcp.stop(holder)

    async def forget(self, holder: int) -> None:
        """Drop what is kept for a holder."""
        await self._mooncake.forget(holder)
        await self._tcp.forget(holder)

    def close(self) -> None:
        """End everything. Idempotent."""
        self._mooncake.close()
        self._tcp.close()
