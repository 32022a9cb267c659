"""How tiers evict: the policies by name, and their parameters. The C extension has the rules."""

from __future__ import annotations

from typing import NamedTuple

from flexkv.common.errors import ConfigError

POLICIES = {"lru": 0, "fifo": 1, "mru": 2, "filo": 3, "lfu": 4, "slru": 5, "lhd": 7}
"""Which block is evicted first, by the number of the policy: `enum policy_kind` in
`ext/index_core.h`. The rules are in `ext/index_policy.c`. 6 is lru with `hit_reward_seconds`.

lru: the least recently used; mru: the most recently used. fifo: the first that came; filo: the last
that came. lfu: the least often used, and of those the least recently. slru: those used fewer than
`slru_protected_threshold` times, then the others, each by last use. lhd, least hit density: the one
that promises the fewest hits for the place and time that it takes, which `ext/index_density.c`
learns; a new block that promises less than all others is not stored.
"""

_REWARD = 6


class Eviction(NamedTuple):
    """Parameters of eviction, the same for every tier."""

    policy: str = "lru"
    evict_ratio: float = 0.0
    """Least part of a tier that one eviction frees."""
    slru_protected_threshold: int = 2
    hit_reward_seconds: float = 0.0
    """With lru: each use counts as if it had come this much later."""

    start_threshold: float = 1.0
    """Used part of a tier from which blocks are evicted ahead of need."""

    @property
    def selective(self) -> bool:
        """Return whether a tier may refuse blocks that are worth less than what it holds."""
        return self.policy == "lhd"

    @property
    def timed(self) -> bool:
        """Return whether the table needs to know the time."""
        return self.hit_reward_seconds > 0

    def options(self, capacity_blocks: int) -> tuple[int, int, int, int]:
        """Return a tier's options as the table takes them.

        Raises:
            ConfigError: an unknown policy, or a reward with a policy that has none.
        """
        if self.policy not in POLICIES:
            why = f"must be one of {', '.join(POLICIES)}"
            raise ConfigError("eviction_policy", self.policy, why)
        number, parameter = POLICIES[self.policy], self.slru_protected_threshold
        if self.hit_reward_seconds > 0:
            if self.policy != "lru":
                why = f"needs eviction_policy lru, not {self.policy}"
                raise ConfigError("hit_reward_seconds", self.hit_reward_seconds, why)
            number, parameter = _REWARD, max(1, round(self.hit_reward_seconds))
        return capacity_blocks, number, parameter, int(capacity_blocks * self.evict_ratio)
