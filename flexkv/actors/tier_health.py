"""Watches the tiers below host memory: which of them may be used, and whether their I/O ends."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping

from flexkv.actors.actor import TransferActor
from flexkv.actors.deadline_timer import DeadlineTimer
from flexkv.actors.health import Breaker, Health
from flexkv.common.errors import TransferError
from flexkv.common.terms import Route, Tier
from flexkv.observe.logs import get_logger

log = get_logger(__name__)


class TierHealth:
    """The breakers of every lower tier, fed with the ends of ops.

    Attributes:
        all_up: whether every direction of every tier is up, so that nothing has to be avoided.
        deadline_s: how long an I/O may take.
        watches_device: whether the deadline applies to device transfers, too. Devices of other
            processes have deadlines of their own, one for each process.
    """

    def __init__(
        self,
        actors: Mapping[Tier, TransferActor],
        deadline_s: float,
        overdue: Callable[[Tier], None],
        tell: Callable[..., None],
    ) -> None:
        """Take the actors to check.

        Args:
            actors: by tier.
            deadline_s: how long an I/O may take.
            overdue: called at each check with every tier that has I/O past its deadline.
            tell: called with an event's kind, tier and detail when the state of a tier changes.
        """
        self._tell = tell
        self.all_up, self.watches_device = True, False
        self._actors = actors
        self.deadline_s = deadline_s
        self._overdue = overdue
        self._breakers: dict[tuple[Tier, bool], Breaker] = {}
        self._timer = DeadlineTimer(deadline_s, self._look)

    def breaker(self, tier: Tier, inbound: bool) -> Breaker:
        """Return the breaker of one direction of a tier."""
        return self._breakers.setdefault((tier, inbound), Breaker())

    def lose(self, tier: Tier, why: str) -> None:
        """Take a tier down for good."""
        for inbound in (True, False):
            self.breaker(tier, inbound).lose()
            self._tell("tier_down", tier, detail=f"{_direction(inbound)} stopped for good: {why}")
        self.all_up = False

    def begun(self, route: Route) -> None:
        """Record that an op went to a lower tier, and start to check whether it ends."""
        self._timer.arm()
        if not self.all_up:
            now_s = asyncio.get_running_loop().time()
            self.breaker(route.outer, route.inbound).begun(now_s)

    def arm(self) -> None:
        """Start to check whether I/O ends."""
        self._timer.arm()

    def _look(self) -> None:
        lower = [actor for actor in self._actors.values() if actor.tier > Tier.HOST]
        for actor in lower:
            if actor.oldest_s() > self.deadline_s:
                self._hang(actor)
            else:
                self._came_back(actor)
        device = self._actors.get(Tier.DEVICE) if self.watches_device else None
        if device is not None and device.oldest_s() > self.deadline_s:
            self._overdue(Tier.DEVICE)
        if any(actor.depth for actor in lower) or (device is not None and device.depth):
            self._timer.arm()

    def _hang(self, actor: TransferActor) -> None:
        news = [self.breaker(actor.tier, inbound).hung() for inbound in (True, False)]
        self.all_up = False
        if any(news):
            self._tell(
                "tier_hung",
                actor.tier,
                detail=f"its oldest I/O has taken {actor.oldest_s():.3f} s so far",
            )
            log.error("tier_hung", tier=actor.name, oldest_s=round(actor.oldest_s(), 3))
        self._overdue(actor.tier)

    def _came_back(self, actor: TransferActor) -> None:
        """Put a tier that hung on trial, since nothing in flight is late any more."""
        if self.all_up:
            return
        now_s = asyncio.get_running_loop().time()
        for inbound in (True, False):
            if self.breaker(actor.tier, inbound).came_back(now_s):
                self._tell("tier_on_trial", actor.tier, detail=_direction(inbound))
                log.info("tier_on_trial", tier=actor.name, reads=inbound)

    def ended(self, route: Route, error: TransferError | None) -> None:
        """Record the end of an op of a lower tier."""
        tier = route.outer
        if not self.all_up and self._actors[tier].oldest_s() <= self.deadline_s:
            self._came_back(self._actors[tier])
        if error is not None and not error.blames_tier:
            return
        now_s = asyncio.get_running_loop().time()
        breaker = self.breaker(tier, route.inbound)
        if error is not None:
            if breaker.failed(now_s):
                self.all_up = False
                detail = f"{_direction(route.inbound)}: {error}"
                self._tell("tier_down", tier, detail=detail)
                log.error("tier_down", tier=tier.label, reads=route.inbound, error=str(error))
        elif breaker.succeeded():
            self.all_up = all(b.health is Health.UP for b in self._breakers.values())
            self._tell("tier_up", tier, detail=_direction(route.inbound))
            log.info("tier_up", tier=tier.label, reads=route.inbound)

    def is_failing(self, tier: Tier) -> bool:
        """Return whether a direction of a tier is not used now, and may be used again."""
        return not self.all_up and any(
            self.breaker(tier, inbound).is_failing for inbound in (True, False)
        )

    def try_now(self, tier: Tier) -> None:
        """Make the next op of each direction that is down a trial."""
        now_s = asyncio.get_running_loop().time()
        for inbound in (True, False):
            self.breaker(tier, inbound).try_now(now_s)

    def unusable(self) -> tuple[frozenset[Tier], frozenset[Tier]]:
        """Return the tiers that must not be read now, and those that must not be written."""
        now_s = asyncio.get_running_loop().time()
        down = [key for key, breaker in self._breakers.items() if not breaker.usable(now_s)]
        return (
            frozenset(tier for tier, inbound in down if inbound),
            frozenset(tier for tier, inbound in down if not inbound),
        )

    def close(self) -> None:
        """Stop checking."""
        self._timer.close()


def _direction(inbound: bool) -> str:
    return "reads" if inbound else "writes"
