"""Configured tiers and directories that the engine goes on without, for statistics and the log."""

from __future__ import annotations

from flexkv.common.terms import Tier
from flexkv.observe.logs import get_logger

log = get_logger(__name__)


class Unavailable:
    """Directories of the SSD tier, and whole tiers, that cannot be used, each with the reason.

    Attributes:
        directories: the reasons, by path.
        tiers: the reasons, by the tier's name.
    """

    def __init__(self) -> None:
        self.directories: dict[str, str] = {}
        self.tiers: dict[str, str] = {}

    def forget(self) -> None:
        """Forget all reasons: the tiers are about to be tried again."""
        self.directories.clear()
        self.tiers.clear()

    def lose_directory(self, path: str, why: str) -> None:
        """Record that a directory cannot be used, and log it."""
        self.directories[path] = why
        log.error("ssd_directory_not_used", directory=path, reason=why)

    def lose_tier(self, tier: Tier, why: str) -> None:
        """Record that a configured tier cannot be used, and log it."""
        self.tiers[tier.label] = why
        log.error("tier_not_available", tier=tier.label, reason=why)

    def remind(self) -> None:
        """Log again what cannot be used; called every `num_log_interval_requests`."""
        for tier, why in self.tiers.items():
            log.warning("tier_still_not_available", tier=tier, reason=why)
        if not self.tiers:
            for path, why in self.directories.items():
                log.warning("ssd_directory_still_not_used", directory=path, reason=why)
