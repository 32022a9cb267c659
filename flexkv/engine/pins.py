"""Keeps blocks from eviction for callers: pins, which they set, and holds, which matches make."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from flexkv import _ext
from flexkv.actors.scheduler import Scheduler
from flexkv.common.errors import ConfigError
from flexkv.common.terms import Tier
from flexkv.index.claims import Holding
from flexkv.index.residency import Residency

HOLD_S = 60.0
"""How long a hold lasts; after that, its blocks may be evicted."""
HELD_SHARE = 2
"""All holds together keep at most a tier's capacity divided by this."""
HOLDS_MAX = 1024
"""The most holds that one group may have; beyond that, its oldest ones end."""
HELD_BLOCKS_MAX = 1 << 22
"""The most blocks in all holds of a group, counting repetitions: it bounds our own memory."""


class _Pin(NamedTuple):
    owner: str
    op_ids: tuple[int, ...]
    expiry: asyncio.TimerHandle


class Pins:
    """All pins of callers. Each one expires, so that a dead caller does not pin blocks for ever."""

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler
        self._pins: dict[int, _Pin] = {}
        self._next_pin = 0

    def __len__(self) -> int:
        return len(self._pins)

    def pin(self, holdings: list[Holding], ttl_s: float, owner: str) -> int:
        """Keep blocks from eviction for `ttl_s` seconds, and return the pin's id.

        Raises:
            ConfigError: `ttl_s` is not positive.
        """
        if not ttl_s > 0:
            raise ConfigError("ttl_s", ttl_s, "must be positive: a pin expires after this time")
        self._next_pin += 1
        expiry = asyncio.get_running_loop().call_later(ttl_s, self.unpin, self._next_pin)
        self._pins[self._next_pin] = _Pin(owner, self._scheduler.hold(holdings), expiry)
        return self._next_pin

    def unpin(self, pin_id: int) -> bool:
        """End a pin; return whether it still existed."""
        pin = self._pins.pop(pin_id, None)
        if pin is None:
            return False
        pin.expiry.cancel()
        self._scheduler.release(pin.op_ids)
        return True

    def unpin_owner(self, owner: str) -> int:
        """End every pin of an owner, and return how many there were."""
        owned = [pin_id for pin_id, pin in self._pins.items() if pin.owner == owner]
        return sum(self.unpin(pin_id) for pin_id in owned)

    def close(self) -> None:
        """End every pin."""
        for pin_id in list(self._pins):
            self.unpin(pin_id)


class _Hold(NamedTuple):
    op_ids: tuple[int, ...]
    holdings: list[Holding]
    expiry_s: float


class Holds:
    """Blocks that matches found and keep from eviction until a request is planned with them.

    A hold is identified by its group, such as an instance of a server, and a number. It expires
    after `HOLD_S`. All holds together keep at most a part of each tier; beyond that, the group that
    holds the most blocks loses its oldest hold. An owner whose hold has ended may lose hits, but
    nothing else.
    """

    def __init__(self, scheduler: Scheduler, residency: Residency) -> None:
        """Take the parts of an engine. In a tier, a block that several holds keep counts once."""
        self._scheduler, self._residency = scheduler, residency
        self._holds: dict[int, dict[int, _Hold]] = {}
        self._by_age: deque[tuple[float, int, int]] = deque()
        """Expiry, group and number of each hold that was made; some have ended since."""
        self._timer: asyncio.TimerHandle | None = None
        self._held: dict[Tier, NDArray[np.uint32]] = {}
        """How many holds keep each block."""
        self._held_blocks: dict[Tier, int] = {}
        self._held_by: dict[int, int] = {}
        """How many blocks each group holds; a block in two of its holds counts twice."""

    def __len__(self) -> int:
        return sum(map(len, self._holds.values()))

    def hold(self, group: int, number: int, holdings: Iterable[Holding]) -> None:
        """Keep blocks from eviction for `HOLD_S`, in place of an earlier hold of this number."""
        self.release(group, number)
        kept = [Holding(tier, ids[: self._blocks_max(tier)]) for tier, ids in holdings if len(ids)]
        if not kept:
            return
        expiry_s = asyncio.get_running_loop().time() + HOLD_S
        hold = _Hold(self._scheduler.hold(kept), kept, expiry_s)
        self._holds.setdefault(group, {})[number] = hold
        self._by_age.append((expiry_s, group, number))
        self._count(group, hold, 1)
        while len(self._holds[group]) > HOLDS_MAX or (
            self._held_by[group] > HELD_BLOCKS_MAX and len(self._holds[group]) > 1
        ):
            self.release(group, next(iter(self._holds[group])))
        while self._is_over():
            most = max(self._held_by, key=self._held_by.__getitem__)
            self.release(most, next(iter(self._holds[most])))
        self._arm()

    def release(self, group: int, number: int) -> None:
        """End a hold, if it has not ended yet."""
        hold = self._holds.get(group, {}).pop(number, None)
        if hold is None:
            return
        self._count(group, hold, -1)
        self._scheduler.release(hold.op_ids)
        if not self._holds[group]:
            del self._holds[group], self._held_by[group]
        if len(self._by_age) > 2 * len(self) + HOLDS_MAX:  # most of them have ended
            self._by_age = deque(each for each in self._by_age if self._is_alive(*each))

    def release_group(self, group: int) -> None:
        """End every hold of a group."""
        for number in list(self._holds.get(group, ())):
            self.release(group, number)

    def close(self) -> None:
        """End every hold."""
        for group in list(self._holds):
            self.release_group(group)
        if self._timer is not None:
            self._timer.cancel()

    # -- inside ---------------------------------------------------------------------------------

    def _blocks_max(self, tier: Tier) -> int:
        return max(1, self._residency.counts(tier).capacity // HELD_SHARE)

    def _count(self, group: int, hold: _Hold, sign: int) -> None:
        for tier, ids in hold.holdings:
            held = self._held.get(tier)
            if held is None or len(held) <= ids.max():
                held = self._held[tier] = _grown(held, int(ids.max()) + 1)
            changed = _ext.change_counts(held, ids, sign)
            self._held_blocks[tier] = self._held_blocks.get(tier, 0) + sign * changed
            self._held_by[group] = self._held_by.get(group, 0) + sign * len(ids)

    def _is_over(self) -> bool:
        return any(held > self._blocks_max(tier) for tier, held in self._held_blocks.items())

    def _is_alive(self, expiry_s: float, group: int, number: int) -> bool:
        hold = self._holds.get(group, {}).get(number)
        return hold is not None and hold.expiry_s == expiry_s

    def _arm(self) -> None:
        """Start the timer for the oldest hold, if it is not running; one timer serves all holds."""
        if self._timer is None and self._by_age:
            loop = asyncio.get_running_loop()
            self._timer = loop.call_at(self._by_age[0][0], self._expire)

    def _expire(self) -> None:
        self._timer = None
        now_s = asyncio.get_running_loop().time()
        while self._by_age and self._by_age[0][0] <= now_s:
            expiry_s, group, number = self._by_age.popleft()
            if self._is_alive(expiry_s, group, number):
                self.release(group, number)
        self._arm()


def _grown(held: NDArray[np.uint32] | None, size: int) -> NDArray[np.uint32]:
    """Return a copy of the counts with room for `size` blocks, and for some more."""
    grown = np.zeros(max(1024, 2 * size), np.uint32)
    if held is not None:
        grown[: len(held)] = held
    return grown
