"""Fetches far blocks into host memory while their prompt waits; they are offered after that.

An engine is never offered a block that could still fail to arrive. A match says how many blocks
behind those that are here are said to be far. If fetching them is expected to be faster than
computing them, a prefetch begins, and the prompt is matched anew once it need not wait any more:

    match: 5 here, 8 far ──▶ prefetch of 8 ──Done─────────────▶ match: 13 here ─▶ load
                                 │  the prompt waits,       ┌─▶ match: 9 here ──▶ load, compute 4
                                 └─ but only so long: stop ─┘   the prefetch goes on

When a prompt stops waiting is a rule of the configuration. It begins to wait when the engine would
run it, so a fetch that began on arrival may be over by then. A prompt fetches once in its life:
what did not arrive the first time is computed. A fetch whose prompt runs already goes on, for later
prompts, until its own request is over. It keeps nothing occupied here, and at the server only the
places in host memory that it fills.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple, TypeAlias

from flexkv.integration.common.costs import Costs
from flexkv.integration.common.kv_groups import KVGroups
from flexkv.integration.common.request_transfers import RequestTransfers, share_of
from flexkv.server.client import Client
from flexkv.server.prompts import PromptPart
from flexkv.server.wire import Done, Matched

StopRule: TypeAlias = Literal["best_effort", "complete", "timeout"]

FETCHES_MAX = 64
"""Maximum number of fetches under way for one engine."""
HOST_SHARE = 4
"""The fetches of one engine may be filling at most host memory divided by this."""
WHOLE_SHARE = 2
"""A fetch of all or nothing may fill so much of it while no other is under way."""
WAIT_S_MAX = 60.0
"""No prompt waits longer than this, whatever the rule."""


class FetchRules(NamedTuple):
    """When a prompt stops waiting for its far blocks.

    Attributes:
        stop: `best_effort`: as soon as the engine would run it; `complete`: at the fetch's end;
            `timeout`: then, but at the latest when it would have been computed meanwhile.
        timeout_s: the most that `timeout` waits.
    """

    stop: StopRule
    timeout_s: float


@dataclass(slots=True, eq=False)
class _Fetch:
    """The fetch of one request, under way or over."""

    request_id: str
    first: int
    last: int
    """The positions of its blocks; `last` is exclusive."""
    end: int
    """Where the prompt's hit ends once all have come: behind it are blocks that drafts drop."""
    by_tier: Mapping[str, int]
    """How many blocks of all KV groups it waits for, by the tier that sends them."""
    own_blocks: int
    """How many of these no other fetch was bringing when it began."""
    ahead: int
    """How many blocks were under way when it began."""
    is_typical: bool
    """Whether it fetches all its blocks itself, so that its time says what they cost."""
    number: int
    done: Done | None = None
    since_s: float | None = None
    """When its prompt began to wait."""
    until_s: float = 0.0
    in_time: int | None = None
    """How many of its blocks had arrived when its prompt stopped waiting; None until then."""
    is_dropped: bool = False
    """Whether its prompt is over."""

    @property
    def gain(self) -> int:
        """Return how many blocks longer the prompt's hit is once all have come."""
        return self.end - self.first


class FarFetches:
    """The fetches of one engine's prompts, at most one for each."""

    def __init__(
        self, client: Client, groups: KVGroups, tokens_per_block: int, rules: FetchRules,
        count: Callable[[str, int], None], costs: Costs | None,
    ) -> None:  # fmt: skip
        """Begin without fetches.

        Args:
            client: sends the prefetches.
            groups: what hits of the engine end on.
            tokens_per_block: of the prefix chain.
            rules: when prompts stop waiting.
            count: adds to the count of this name.
            costs: knows what is faster; None: whatever is far is fetched.
        """
        self._client, self._groups, self._per_block = client, groups, tokens_per_block
        self._rules, self._count, self._costs = rules, count, costs
        self._of_request: dict[str, _Fetch] = {}
        self._under_way: dict[int, _Fetch] = {}

    @property
    def blocks_under_way(self) -> int:
        """Return how many blocks of all KV groups are being fetched."""
        return sum(fetch.own_blocks for fetch in self._under_way.values())

    def begin(
        self, request: RequestTransfers, found: Matched, blocks: int, is_tried: bool,
        part_of: Callable[[int], PromptPart],
    ) -> bool:  # fmt: skip
        """Begin to fetch what lies far behind a match, if that pays; return whether it began.

        A request that is tried waits for the fetch then. The hold of the match ends once the fetch
        is planned, or has failed.

        Args:
            request: has `local_blocks`; 0 as long as these are not known.
            found: the match.
            blocks: how many blocks the match was about.
            is_tried: whether the engine would run the request now.
            part_of: returns a part of its prompt: this many of the first blocks.
        """
        far, groups, ahead = sum(found.far.values()), self._groups, self.blocks_under_way
        if not far or not request.may_fetch or request.load_deadline_s == 0:
            return False
        if not (fitting := self._fitting(found, far)):
            request.may_fetch = not is_tried
            self._count("declined_far_blocks", far)
            return False
        end = groups.aligned(found.blocks + fitting)
        gain = end - max(groups.aligned(found.blocks), request.local_blocks)
        if gain <= 0 or (is_tried and self._limit_s(request, gain) <= 0):
            return False  # in the latter case it runs now, and computes them
        request.may_fetch = False
        last = min(blocks, end + groups.drop)
        by_tier = share_of(found.fetched, end - found.blocks, far)
        costs, others = self._costs, max(0, ahead - found.coming)
        if costs and not costs.is_worth_fetching(by_tier, others, gain * self._per_block):
            self._count("declined_far_blocks", far)
            return False
        # With several KV groups a prefix is fetched whole, so the server must know where it ends.
        drop = last - end if groups.several else 0
        number = self._client.prefetch(part_of(last), found.blocks, found.number, drop)
        self._client.flush()
        own_blocks = max(0, sum(by_tier.values()) - found.coming)
        fetch = _Fetch(request.request_id, found.blocks, last, end, by_tier, own_blocks, ahead,
                       not found.coming, number)  # fmt: skip
        self._of_request[request.request_id] = self._under_way[number] = fetch
        self._count("fetches", 1)
        return not is_tried or self.waits(request)

    def _fitting(self, found: Matched, far: int) -> int:
        """Return how many of the far blocks may be fetched now: all, or as many as fit.

        With several KV groups a part would be of no use, and neither is a part of a span: it is
        named by its last block, so it cannot be fetched for a prefix that ends before that.
        """
        groups, ahead, welcome = self._groups, self.blocks_under_way, self._client.welcome
        if len(self._under_way) >= FETCHES_MAX:
            return 0
        share = WHOLE_SHARE if groups.several and not ahead else HOST_SHARE
        room = max(0, welcome.num_host_blocks // share - ahead)
        if sum(found.fetched.values()) - found.coming <= room:
            return far
        if groups.several:
            return 0
        begin, span_blocks = found.blocks + groups.drop, max(1, welcome.span_blocks)
        end = (begin + found.coming + room) // span_blocks * span_blocks
        return max(0, min(far, end - begin))

    def waits(self, request: RequestTransfers) -> bool:
        """Return whether a request that the engine would run now waits for its far blocks."""
        fetch = self._of_request.get(request.request_id)
        if fetch is None or fetch.in_time is not None:
            return False
        now_s = time.monotonic()
        if fetch.since_s is None:
            gain = fetch.end - max(self._groups.aligned(fetch.first), request.local_blocks)
            limit_s = 0.0 if fetch.done is not None else self._limit_s(request, gain)
            fetch.since_s, fetch.until_s = now_s, now_s + limit_s
            if limit_s > 0:
                self._count("fetch_waits", 1)
        return fetch.done is None and now_s < fetch.until_s

    def _limit_s(self, request: RequestTransfers, gain: int) -> float:
        """Return how long a request may wait for `gain` blocks that it would otherwise compute."""
        rules, limit_s = self._rules, WAIT_S_MAX
        if rules.stop == "best_effort":
            limit_s = 0.0
        elif rules.stop == "timeout":
            limit_s = min(limit_s, rules.timeout_s)
            if self._costs is not None:
                computing_s = self._costs.computing_s(max(0, gain) * self._per_block)
                limit_s = limit_s if computing_s is None else min(limit_s, computing_s)
        deadline_s = request.load_deadline_s
        return limit_s if deadline_s is None else min(limit_s, deadline_s)

    def stop(self, request: RequestTransfers, found: Matched | None = None) -> None:
        """Record that a request does not wait for its fetch any more.

        Args:
            request: any request.
            found: what it is offered now; None if it runs or ends without an offer.
        """
        fetch = self._of_request.get(request.request_id)
        if fetch is None or fetch.in_time is not None:
            return
        self._end_wait(fetch)
        arrived = 0 if found is None else min(found.blocks, fetch.last) - fetch.first
        if fetch.done is not None:
            arrived = fetch.done.moved
        fetch.in_time = max(0, arrived)
        self._add("fetched_blocks", fetch.in_time)
        if fetch.done is not None:
            self._settle(fetch, fetch.done)

    def take(self, done: Done) -> bool:
        """Handle the end of a fetch; return whether it was one."""
        fetch = self._under_way.pop(done.number, None)
        if fetch is None:
            return False
        fetch.done = done
        if self._costs is not None and (brought := self._brought(fetch, done)):
            self._costs.fetched(brought, fetch.ahead, done.took_s)
        if fetch.in_time is not None:
            self._settle(fetch, done)
        return True

    def _brought(self, fetch: _Fetch, done: Done) -> Mapping[str, int]:
        """Return how many blocks by tier explain how long a fetch has taken; none if none do."""
        if not fetch.is_typical or not done.moved:
            return {}
        if self._groups.several:  # if it came short, it was planned again, and brought other ones
            return fetch.by_tier if done.moved >= fetch.gain else {}
        return share_of(fetch.by_tier, done.moved, sum(fetch.by_tier.values()))

    def _settle(self, fetch: _Fetch, done: Done) -> None:
        """Count what a fetch has brought, once it is over and its prompt waits no more."""
        assert fetch.in_time is not None
        self._add("late_fetched_blocks", max(0, done.moved - fetch.in_time))
        if not fetch.is_dropped:
            self._add("missing_far_blocks", max(0, fetch.gain - done.moved))

    def finish(self, request: RequestTransfers) -> None:
        """Give up the fetch of a request that is over, if it is under way."""
        self.stop(request)
        fetch = self._of_request.pop(request.request_id, None)
        if fetch is not None and fetch.done is None:
            fetch.is_dropped = True
            self._client.cancel([fetch.number])

    def give_up_all(self) -> None:
        """Give up every fetch, since its blocks are of an earlier generation; end all waits."""
        self._client.cancel(list(self._under_way))
        for fetch in self._of_request.values():
            self._end_wait(fetch)
            fetch.is_dropped, fetch.in_time = True, fetch.in_time or 0
        self._of_request.clear()

    def _end_wait(self, fetch: _Fetch) -> None:
        """Count how long a prompt has waited, if it has waited until now."""
        if fetch.in_time is None and fetch.since_s is not None and fetch.until_s > fetch.since_s:
            waited_s = min(time.monotonic(), fetch.until_s) - fetch.since_s
            self._add("fetch_wait_ms", round(waited_s * 1e3))

    def _add(self, name: str, by: int) -> None:
        if by:
            self._count(name, by)
