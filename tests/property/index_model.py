"""A model of the index in dicts and sets, and a driver that compares the index with it.

The policy decides which blocks are evicted, so the model asks the index for them and checks that
none was pinned, being filled, or the last copy of a parent whose children stay resident. A
reservation must get as many places as the model finds possible, or none if it is atomic.
"""

from __future__ import annotations

from math import lcm
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from flexkv._ext import needed
from flexkv.common.space import GroupRule
from flexkv.common.terms import Positions, Tier
from flexkv.index.change_hub import ChangeHub
from flexkv.index.eviction import Eviction
from flexkv.index.forest import forest
from flexkv.index.found import Limits
from flexkv.index.residency import (
    ABSENT,
    ALL,
    GONE,
    PENDING,
    PREFIX,
    READY,
    TAKEN,
    THERE,
    Residency,
)
from tests.property.index_names import (
    BLOCK_TOKENS,
    DEPTH,
    DEPTHS,
    NAMESPACES,
    PATHS,
    PROMPTS,
    TIERS,
    Path,
    allows,
    chain_of,
    group_of,
    key_of,
    keys_of,
    places_found,
    positions_of,
)
from tests.property.index_spans import check_spans


class Place:
    """The place of one block in one tier."""

    def __init__(self, block_id: int, filler: int) -> None:
        self.block_id, self.state, self.pins = block_id, PENDING, 0
        self.filler = filler


class Lease(NamedTuple):
    """Places that are being filled together."""

    tier: Tier
    places: list[Place]


class Driver:
    """Performs each operation on the index and on the model, and compares the results."""

    def __init__(
        self,
        eviction: Eviction,
        host: int = 5,
        disk: int = 7,
        rules: tuple[GroupRule, ...] = (),
    ) -> None:
        self.index = Residency({Tier.HOST: host, Tier.DISK: disk}, eviction, rules=rules)
        self.eviction, self.rules, self.groups = eviction, rules, range(1 + len(rules))
        self.names = [
            *PATHS,
            *((*path, -group) for path in PATHS for group in self.groups[1:]
              if len(path) - 2 in positions_of(rules, group, DEPTH)),
        ]  # fmt: skip
        self.capacity = {Tier.HOST: host, Tier.DISK: disk}
        self.most = dict(self.capacity)
        self.blocks: dict[Path, dict[Tier, Place]] = {}
        self.quota: dict[tuple[Tier, int], int] = {}
        self.nameless: dict[Tier, set[Place]] = {tier: set() for tier in TIERS}
        self.leases: list[Lease] = []
        self.fillers = 0
        """The number of ops that have filled places so far, which is the id of the last."""
        self.pins: list[tuple[Tier, Place]] = []
        self.now_s = 0
        self.hub = ChangeHub(self.index)
        self.changes = self.hub.reader(1000)
        self.told: set[tuple[Tier, bytes, int]] = set()
        """The READY blocks, according to the reported changes alone."""

    # -- the model ------------------------------------------------------------------------------

    def ready_places(self, tier: Tier) -> dict[Path, Place]:
        """Return the READY places of a tier, by block."""
        return {
            path: places[tier]
            for path, places in self.blocks.items()
            if tier in places and places[tier].state == READY
        }

    def used(self, tier: Tier) -> int:
        """Return the number of places of a tier that are not FREE."""
        named = sum(tier in places for places in self.blocks.values())
        return named + len(self.nameless[tier])

    def may_go(self, path: Path, tier: Tier) -> bool:
        """Return whether a READY place may be evicted now."""
        places = self.blocks[path]
        if places[tier].pins:
            return False
        if any(p.state == READY for other, p in places.items() if other is not tier):
            return True
        return not any(len(p) > len(path) and p[: len(path)] == path for p in self.blocks)

    def _drop(self, path: Path, tier: Tier) -> None:
        """Take a place from its block; a block left without places drops those that continue it."""
        place = self.blocks[path].pop(tier)
        if place.state == PENDING or place.pins:
            self.nameless[tier].add(place)
        if not self.blocks[path]:
            for other in [p for p in self.blocks if p[: len(path)] == path]:
                for of in list(self.blocks.get(other, ())):
                    place = self.blocks[other].pop(of)
                    if place.state == PENDING or place.pins:
                        self.nameless[of].add(place)
                del self.blocks[other]

    def used_by(self, tier: Tier, space: int) -> int:
        """Return the number of places of a tier that a namespace has."""
        return sum(p[0] == space and tier in at for p, at in self.blocks.items())

    def left_of(self, tier: Tier, space: int) -> int:
        """Return the number of places left in a namespace's quota; negative if it is exceeded."""
        return self.quota.get((tier, space), 1 << 30) - self.used_by(tier, space)

    def _evictable(self, tier: Tier, space: int | None = None) -> int:
        """Return how many blocks can be evicted one after another, of one namespace or of all."""
        saved = {path: dict(places) for path, places in self.blocks.items()}
        count = 0
        while victim := next(
            (
                path
                for path in self.ready_places(tier)
                if space in (None, path[0]) and self.may_go(path, tier)
            ),
            None,
        ):
            self._drop(victim, tier)
            count += 1
        self.blocks = saved
        return count

    def _note_evictions(self, tier: Tier) -> int:
        """Drop what the index has evicted, leaf first, and check that each block might go."""
        number = TIERS.index(tier)
        gone = [p for p in self.ready_places(tier) if self._states(p)[number] == ABSENT]
        for path in sorted(gone, key=len, reverse=True):
            assert self.may_go(path, tier), f"{path} was evicted from {tier.label}"
            self._drop(path, tier)
        return len(gone)

    def _states(self, path: Path) -> tuple[int, ...]:
        """Return the state that the index has for a block in each tier."""
        chain = chain_of(path)
        at = len(chain) - 2
        told = self.index.survey(keys_of(chain), at, at + 1, False, group_of(path))
        return told[0].states if told else (ABSENT,) * len(TIERS)

    def _nearest(self, path: Path, limits: Limits) -> tuple[Tier, int, bool] | None:
        """Return from where a block would be loaded, and whether it is ready there."""
        for tier, place in sorted(self.blocks.get(path, {}).items(), key=lambda item: item[0]):
            is_awaited = tier == Tier.HOST and limits.fillers is not None
            is_awaited = is_awaited and place.filler not in (limits.fillers or ())
            if tier not in limits.tiers and (place.state == READY or is_awaited):
                return tier, place.block_id, place.state == READY
            if tier == Tier.HOST:
                return None
        return None

    def _reached(
        self, prompt: Path, first: int, chain: int, drop: int, limits: Limits
    ) -> tuple[int, dict[int, list[int]]]:
        """Return the longest prefix that every KV group can load, and the positions of its leaves.

        `chain` is where the chain ends.
        """
        step = lcm(*(of.ratio for of in self.rules))
        for last in range((chain - drop) // step * step, first, -step):
            wanted = {}
            for group, kind, window, ratio, tokens in self.rules:
                own = range(*needed(kind, window, tokens, last * BLOCK_TOKENS))
                at = [p for p in ((n + 1) * ratio - 1 for n in own) if p >= first]
                wanted |= {group: at} if at else {}
            if all(
                self._nearest((*prompt[: n + 2], -group), limits) and allows(limits, group, n)
                for group in wanted
                for n in wanted[group]
            ):
                return last, wanted
        return first, {}

    # -- operations -----------------------------------------------------------------------------

    def reserve(
        self, tier: Tier, path: Path, begin: int, atomic: bool = False, group: int = 0
    ) -> None:
        """Reserve what a prompt lacks in a tier from `begin` on, unless its parent is absent."""
        prompts = [path[: n + 1] for n in range(1, len(path))]
        assert self.index.agreeing(keys_of(path)) == len(prompts)
        names = [(*prompt, -group) if group else prompt for prompt in prompts]
        lacking = [
            n
            for n in positions_of(self.rules, group, len(names))
            if n >= begin and tier not in self.blocks.get(names[n], ())
            and (not group or prompts[n] in self.blocks)
        ]  # fmt: skip
        first = lacking[0] if lacking else 0
        if not lacking or (not group and first and prompts[first - 1] not in self.blocks):
            return
        # Like the planner, pin the prompt's resident blocks while the rest is reserved.
        held = [
            (of, self.blocks[p][of])
            for p in {*prompts, *names}
            if p in self.blocks
            for of in self.blocks[p]
        ]
        for of, place in held:
            self._pin(of, place)
        free = self.capacity[tier] - self.used(tier)
        evictable, own = self._evictable(tier), self._evictable(tier, path[0])
        left = self.left_of(tier, path[0])
        positions = Positions(first, len(lacking), np.array(lacking, np.int64))
        if lacking == list(range(first, first + len(lacking))):
            positions = Positions(first, len(lacking))
        how = ALL if atomic else PREFIX
        ids = self.index.reserve(tier, keys_of(path), positions, how, group)
        self._note_evictions(tier)
        possible = max(0, min(len(lacking), free + evictable, left + own))
        assert len(ids) == (possible if possible == len(lacking) or not atomic else 0)
        places = self._leased(tier, ids)
        for number, place in zip(lacking, places, strict=False):
            self.blocks.setdefault(names[number], {})[tier] = place
        if places:
            self.leases.append(Lease(tier, places))
        for of, place in held:
            self._unpin(of, place)

    def make_room(self, tier: Tier, space: int, count: int) -> None:
        """Make room for a number of blocks of a namespace, or evict nothing."""
        free, left = self.capacity[tier] - self.used(tier), self.left_of(tier, space)
        possible = min(free + self._evictable(tier), left + self._evictable(tier, space))
        told = self.index.make_room(tier, key_of((space,)), count)
        assert told == (count <= possible or not count)
        evicted = self._note_evictions(tier)
        assert told or not evicted
        assert not told or self.capacity[tier] - self.used(tier) >= count

    def reserve_copies(self, source: Tier, paths: list[Path]) -> None:
        """Reserve places in the other tier for blocks of `source`; some of them may be gone."""
        (target,) = (tier for tier in TIERS if tier is not source)
        ready = self.ready_places(source)
        # A block that is gone is taken for the one in place 0, unless that has the same key: then
        # another block of that key would be copied, as what it is.
        there = {key_of(path) for path, place in ready.items() if not place.block_id}
        gone = {path: -1 if key_of(path) in there else 0 for path in paths}
        ids = np.array([ready[p].block_id if p in ready else gone[p] for p in paths], np.int64)
        free = self.capacity[target] - self.used(target)
        evictable = self._evictable(target)
        outcomes, taken = self.index.reserve_copies(
            source, target, ids, b"".join(map(key_of, paths))
        )
        had = {path for path in paths if target in self.blocks.get(path, {})}
        told = list(zip(paths, outcomes.tolist(), strict=True))
        for path in {path for path, outcome in told if outcome == TAKEN} & had:
            self._drop(path, target)  # it was evicted for another block, and then reserved again
        self._note_evictions(target)
        places = iter(self._leased(target, taken))
        leased, wanted = [], set[Path]()
        for path, outcome in told:
            if path not in ready:
                assert outcome == GONE
                continue
            wanted.add(path)
            assert outcome == THERE or target not in self.blocks[path]
            assert outcome != THERE or path in had or target in self.blocks[path]
            if outcome == TAKEN:
                place = self.blocks[path][target] = next(places)
                leased.append(place)
        assert next(places, None) is None
        assert len(leased) <= free + evictable
        lacked = [path for path in wanted - had if target not in self.blocks[path]]
        bounded = any(self.left_of(target, path[0]) < 1 << 29 for path in lacked)
        if lacked and not bounded and not self.index.selective:
            assert len(leased) == free + evictable, "places were left"
        if leased:
            self.leases.append(Lease(target, leased))

    def _leased(self, tier: Tier, ids: NDArray[np.int64]) -> list[Place]:
        """Let an op fill reserved places."""
        self.fillers += 1
        self.index._table.lease(self.index._number[tier], ids, self.fillers)
        return [Place(block_id, self.fillers) for block_id in ids.tolist()]

    def settle(self, number: int, filled: bool) -> None:
        """Commit or abort a lease."""
        if not self.leases:
            return
        tier, places = self.leases.pop(number % len(self.leases))
        ids = np.array([place.block_id for place in places])
        (self.index.commit if filled else self.index.abort)(tier, ids)
        for place in places:
            path = next((p for p, at in self.blocks.items() if at.get(tier) is place), None)
            if path is not None and not filled:
                self._drop(path, tier)
            place.state = READY
            if path is None or not filled:
                self.nameless[tier].discard(place)
                if place.pins:
                    self.nameless[tier].add(place)

    def _pin(self, tier: Tier, place: Place) -> None:
        self.index._table.pin(self.index._number[tier], np.array([place.block_id]))
        place.pins += 1

    def _unpin(self, tier: Tier, place: Place) -> None:
        self.index._table.unpin(self.index._number[tier], np.array([place.block_id]))
        place.pins -= 1
        if not place.pins and place.state == READY:
            self.nameless[tier].discard(place)

    def pin(self, tier: Tier, path: Path) -> None:
        """Pin a block's place in a tier."""
        place = self.blocks.get(path, {}).get(tier)
        if place is not None and len(self.pins) < 6:
            self._pin(tier, place)
            self.pins.append((tier, place))

    def unpin(self, number: int) -> None:
        """Unpin one of the pinned places."""
        if self.pins:
            self._unpin(*self.pins.pop(number % len(self.pins)))

    def use(self, path: Path, first: int = 0, drop: int = 0, limits: Limits | None = None) -> None:
        """Find a prompt as a use, and compare what is found."""
        of_every_group, limits = bool(self.rules or limits), limits or Limits()
        if of_every_group:
            found = self.index.reach(keys_of(path), first, True, drop, limits)
        else:
            found = self.index.find(keys_of(path), first, True, drop)
        at = [self._nearest(path[: n + 2], limits) for n in range(len(path) - 1)]
        chain = next((n for n in range(first, len(at)) if not (at[n] and at[n][2])), len(at))
        last = next((n for n in range(first, len(at)) if not at[n]), len(at))
        chain, last = max(first, chain), max(first, last)
        leaves: dict[int, list[int]] = {}
        if of_every_group:
            last, leaves = self._reached(path, first, last, drop, limits)
        else:
            last = max(first, last - drop)
        assert (found.last, found.chain) == (last, chain)
        assert places_found(found) == {n: at[n] for n in range(first, last)}
        assert {of.group: places_found(of) for of in found.leaves} == {
            group: {n: self._nearest((*path[: n + 2], -group), limits) for n in positions}
            for group, positions in leaves.items()
        }
        self.now_s += 1
        self.index.tick(self.now_s)

    def evict(self, tier: Tier, blocks: int) -> None:
        """Evict a number of blocks of a tier."""
        possible = min(blocks, self._evictable(tier))
        assert self.index.evict(tier, blocks) == possible
        assert self._note_evictions(tier) == possible

    def forget(self, tier: Tier, path: Path) -> None:
        """Forget a block in a tier."""
        place = self.blocks.get(path, {}).get(tier)
        if place is not None:
            self.index.forget(tier, np.array([place.block_id]))
            self._drop(path, tier)

    def clear(self, tier: Tier | None, space: int | None) -> None:
        """Clear a tier, a namespace, or everything."""
        self.index.clear(tier, None if space is None else key_of((space,)))
        for path in list(self.blocks):
            for of in list(self.blocks.get(path, ())):
                if tier in (None, of) and space in (None, path[0]):
                    self._drop(path, of)

    def resize(self, tier: Tier, capacity: int) -> None:
        """Change a tier's capacity."""
        capacity = min(capacity, self.most[tier])
        floor = self.used(tier) - self._evictable(tier)
        self.capacity[tier] = self.index.resize(tier, capacity)
        self._note_evictions(tier)
        assert self.capacity[tier] == max(capacity, min(floor, self.most[tier]))

    def set_quota(self, tier: Tier, space: int, blocks: int | None) -> None:
        """Set or lift a namespace's quota; blocks beyond it are evicted as far as possible."""
        self.quota[tier, space] = 1 << 30 if blocks is None else blocks
        beyond = self.used_by(tier, space) - self.quota[tier, space]
        possible = max(0, min(beyond, self._evictable(tier, space)))
        self.index.set_quota(key_of((space,)), tier, blocks)
        assert self._note_evictions(tier) == possible

    # -- comparison -----------------------------------------------------------------------------

    def check(self) -> None:
        """Compare everything that can be observed."""
        self.index._table.validate()
        assert self._all_states() == {
            path: tuple(places[t].state if t in places else ABSENT for t in TIERS)
            for path, places in self.blocks.items()
        }
        for path in self.blocks:
            assert len(path) == 2 or path[:-1] in self.blocks, "a hole"
        self._check_changes()
        for tier in TIERS:
            counts = self.index.counts(tier)
            assert counts.free == self.capacity[tier] - self.used(tier)
            groups = [group_of(path) for path in self.ready_places(tier)]
            assert counts.ready == len(groups)
            assert self.index.group_blocks(tier) == [groups.count(group) for group in self.groups]
            (other,) = (each for each in TIERS if each is not tier)
            lacking = {
                place.block_id
                for path, place in self.ready_places(tier).items()
                if other not in self.blocks[path]
            }
            assert set(self.index.lacking(tier, other, 0, self.most[tier]).tolist()) == lacking
            assert self.index.lacking(tier, other, 1, 2).tolist() == [1] * (1 in lacking)
            ready = {path: at.block_id for path, at in self.ready_places(tier).items()}
            check_spans(self.index, tier, ready, self.most[tier])
            for space in range(NAMESPACES):
                told = self.index.namespace_blocks(key_of((space,)))[tier]
                assert told == self.used_by(tier, space)

    def _all_states(self) -> dict[Path, tuple[int, ...]]:
        """Return the states of each block that the index has anywhere."""
        return {
            ((*prompt[: n + 2], -group) if group else prompt[: n + 2]): states
            for prompt in PROMPTS
            for group in self.groups
            for states, positions, _ in self.index.survey(
                keys_of(prompt), 0, DEPTH, False, group
            )
            if any(states)
            for n in positions
        }  # fmt: skip

    def _check_changes(self) -> None:
        changes = self.changes.take()
        assert changes is not None
        for key, tier, is_ready, group, depth, tiers in changes:
            assert ((tier, key, group) in self.told) != is_ready, "told twice"
            (self.told.add if is_ready else self.told.remove)((tier, key, group))
            assert tiers == {of for of in TIERS if (of, key, group) in self.told}
            assert depth == DEPTHS[key, group]
        assert self.told == {
            (tier, key_of(path), group_of(path))
            for tier in TIERS
            for path in self.ready_places(tier)
        }

    def finish(self) -> None:
        """End every lease and pin; then nothing is reserved, pinned or draining."""
        while self.leases:
            self.settle(0, False)
        while self.pins:
            self.unpin(0)
        self.check()
        for tier in TIERS:
            counts = self.index.counts(tier)
            assert (counts.reserved, counts.pinned, counts.draining) == (0, 0, 0)

    def restart(self) -> None:
        """End everything, and restore the lower tier in a new index."""
        self.finish()
        ready = self.ready_places(Tier.DISK)
        ids = np.array([place.block_id for place in ready.values()], np.int64)
        records = self.index.export(Tier.DISK, ids)
        reached = forest(records, len(self.groups))
        self.__init__(self.eviction, self.most[Tier.HOST], self.most[Tier.DISK], self.rules)
        self.index.restore(Tier.DISK, records[reached.order], reached.parents, ids[reached.order])
        for path in sorted(ready, key=len):
            if len(path) == 2 or path[:-1] in self.blocks:
                self.blocks[path] = {Tier.DISK: Place(ready[path].block_id, 0)}
                self.blocks[path][Tier.DISK].state = READY
        self.check()
