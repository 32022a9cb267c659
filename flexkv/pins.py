"""Pins that callers set: prefixes or namespaces that stay resident, until unpinned or expired."""

from __future__ import annotations

import asyncio
from typing import NamedTuple

from flexkv.actors.scheduler import Scheduler
from flexkv.common.errors import ConfigError
from flexkv.index.claims import Holding


class _Pin(NamedTuple):
    owner: str
    tokens: tuple[int, ...]
    expiry: asyncio.TimerHandle


class Pins:
    """Every pin that a caller holds. Each ends by itself, so that no dead caller pins for ever."""

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler
        self._pins: dict[int, _Pin] = {}
        self._next_pin = 0

    def __len__(self) -> int:
        return len(self._pins)

    def pin(self, holdings: list[Holding], ttl_s: float, owner: str) -> int:
        """Keep blocks from eviction for `ttl_s` seconds, and give the pin's id.

        Raises:
            ConfigError: `ttl_s` is not positive.
        """
        if not ttl_s > 0:
            raise ConfigError("ttl_s", ttl_s, "must be positive: a pin ends by itself")
        self._next_pin += 1
        expiry = asyncio.get_running_loop().call_later(ttl_s, self.unpin, self._next_pin)
        self._pins[self._next_pin] = _Pin(owner, self._scheduler.hold(holdings), expiry)
        return self._next_pin

    def unpin(self, pin_id: int) -> bool:
        """End a pin; tell whether there still was one."""
        pin = self._pins.pop(pin_id, None)
        if pin is None:
            return False
        pin.expiry.cancel()
        self._scheduler.release(pin.tokens)
        return True

    def unpin_owner(self, owner: str) -> int:
        """End every pin of an owner, and count them."""
        owned = [pin_id for pin_id, pin in self._pins.items() if pin.owner == owner]
        return sum(self.unpin(pin_id) for pin_id in owned)

    def close(self) -> None:
        """End every pin."""
        for pin_id in list(self._pins):
            self.unpin(pin_id)
