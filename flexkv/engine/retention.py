"""Lets callers decide what is kept: clear, resize, quotas, pins. Traffic may go on."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from flexkv.common.arguments import integer, member, seconds, text
from flexkv.common.errors import ConfigError, TransferError
from flexkv.common.request import Operation
from flexkv.common.terms import Tier
from flexkv.engine.pins import Pins
from flexkv.index.found import READY_ONLY
from flexkv.index.intake import Intake
from flexkv.index.keys import Namespace
from flexkv.index.residency import NO_QUOTA, Residency
from flexkv.tiers.parts import Persistence


class Retention:
    """Controls what an engine keeps. Arguments and errors are those of `KVManager`.

    Attributes:
        pins: the pins that callers hold.
    """

    def __init__(
        self,
        intake: Intake,
        residency: Residency,
        opened_with: Mapping[Tier, int],
        persistence: Mapping[Tier, Persistence],
        pins: Pins,
    ) -> None:
        """Take the parts of an engine, and how many blocks each tier was opened with."""
        self._intake, self._residency, self._persistence = intake, residency, persistence
        self._opened_with, self.pins = opened_with, pins
        self.about_to_clear: Callable[[], None] = lambda: None
        """Called before each clear."""
        self.on_clear: Callable[[Tier | None, bytes | None], None] = lambda tier, root: None
        """Called with the tier that was cleared, or the root of the namespace; both are None if
        everything was."""

    def clear(self, tier: Tier | None = None, namespace: Namespace = None) -> int:
        """Forget the blocks of a tier, of a namespace, or all; return how many places they had.

        Puts that began earlier store nothing. The journals of the SSD tier are written in the
        background: `clear_durably` waits for that, and so does a flush.
        """
        self._check_tier(tier)
        root = None if namespace is None else self._intake.root(namespace)
        if root is not None and tier is not None:
            raise ConfigError("tier", tier.label, "must not be given together with a namespace")
        self.about_to_clear()
        for each, persistence in self._persistence.items():
            if tier in (None, each):
                persistence.clear(root)
        places = self._residency.clear(tier, root)
        self.on_clear(tier, root)
        return places

    async def clear_durably(self, tier: Tier | None = None, namespace: Namespace = None) -> int:
        """Do what `clear` does, and return once no crash can bring the blocks back.

        Raises:
            TransferError: all is cleared, but the next run may find blocks: a StorageError says
                that a journal could not be written, a RemoteError that the store did not answer.
        """
        places = self.clear(tier, namespace)
        failed: TransferError | None = None
        for persistence in self._persistence.values():
            try:
                await persistence.written()
            except TransferError as error:
                failed = failed or error
        if failed is not None:
            raise failed
        return places

    def resize(self, tier: Tier, capacity_blocks: int) -> int:
        """Set how many blocks a tier may hold, up to what it was opened with; return the number."""
        self._check_tier(member("tier", tier, Tier))
        most = self._opened_with[tier]
        if not 1 <= integer("capacity_blocks", capacity_blocks) <= most:
            why = f"must be from 1 to the {tier.label} tier's size at the start, {most}"
            raise ConfigError("capacity_blocks", capacity_blocks, why)
        return self._residency.resize(tier, int(capacity_blocks))

    def set_quota(self, namespace: Namespace, tier: Tier, blocks: int | None) -> None:
        """Bound how many blocks of a tier a namespace may have; None removes the bound."""
        self._check_tier(member("tier", tier, Tier))
        if blocks is not None and not 0 <= (blocks := integer("blocks", blocks)) < NO_QUOTA:
            raise ConfigError("blocks", blocks, f"must be None, or from 0 to {NO_QUOTA - 1}")
        try:
            self._residency.set_quota(self._intake.root(namespace), tier, blocks)
        except ValueError as error:
            raise ConfigError("namespace", namespace, str(error)) from error

    def namespace_blocks(self, namespace: Namespace) -> dict[Tier, int]:
        """Return the number of a namespace's blocks by tier, including those being filled."""
        return self._residency.namespace_blocks(self._intake.root(namespace))

    def _check_tier(self, tier: Tier | None) -> None:
        if tier is not None and member("tier", tier, Tier) not in self._residency.tiers:
            have = ", ".join(tier.label for tier in self._residency.tiers)
            raise ConfigError("tier", tier.label, f"must be one of the tiers in use: {have}")

    def pin(self, token_ids: Any, namespace: Namespace, ttl_s: float, owner: str) -> int:
        """Pin the resident prefix of a prompt, or without one a namespace; return the id."""
        ttl_s, owner = seconds("ttl_s", ttl_s), text("owner", owner)
        if token_ids is None:
            holdings = self._residency.namespace_holdings(self._intake.root(namespace))
        else:
            request = self._intake.request(Operation.PREFETCH, 0, token_ids, None, namespace)
            # Blocks that are on their way may not arrive: the prefix would lack some leaves then.
            holdings = self._residency.reach(request.keys, limits=READY_ONLY).holdings
        return self.pins.pin(holdings, ttl_s, owner)
