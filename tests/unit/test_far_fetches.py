"""The rules by which prompts wait for far blocks, over a client that the test speaks for."""

from __future__ import annotations

from collections import Counter
from random import Random
from types import SimpleNamespace
from typing import Any

import pytest

from flexkv.common.config import ModelConfig
from flexkv.integration.common import far_fetches as module
from flexkv.integration.common.far_fetches import (
    FETCHES_MAX,
    HOST_SHARE,
    WAIT_S_MAX,
    FarFetches,
    FetchRules,
    StopRule,
)
from flexkv.integration.common.kv_groups import KVGroups
from flexkv.integration.common.request_transfers import RequestTransfers
from flexkv.server.prompts import Prompt, PromptPart
from flexkv.server.wire import PROTOCOL_VERSION, Done, Matched, Welcome
from tests.unit.group_spaces import STATE, spaces_of
from tests.unit.transfer_rig import HELD

PER_BLOCK, BLOCKS, HERE = 4, 20, 3
SPACES = ModelConfig(num_layers=1, num_kv_heads=1, head_size=8, dtype="float16").spaces(PER_BLOCK)
SEVERAL = spaces_of((STATE, 0, 2 * PER_BLOCK))


def far(blocks: int, here: int = HERE, number: int = HELD, coming: int = 0) -> Matched:
    """Return a match that has found some blocks here, and others far behind them."""
    lies = {"remote": blocks}
    return Matched(number, here, {"host": here}, far=lies, coming=coming, fetched=lies)


FAR = far(8)
TIMEOUT_S = 2.0


class Client:
    """A client that records what is begun and cancelled."""

    def __init__(self, host_blocks: int, span_blocks: int = 1) -> None:
        self.welcome = Welcome(
            PROTOCOL_VERSION, 1, num_host_blocks=host_blocks, far_tiers=("remote",),
            span_blocks=span_blocks,
        )  # fmt: skip
        self.begun: dict[int, tuple[int, int, int]] = {}
        self.cancelled: list[int] = []
        self.drops: list[int] = []
        self.sent = 0

    def prefetch(self, keys: PromptPart, first: int, held: int, drop: int) -> int:
        """Begin a prefetch of the blocks from `first` on."""
        self.begun[len(self.begun) + 1] = first, keys.blocks, held
        self.drops.append(drop)
        return len(self.begun)

    def flush(self) -> None:
        """Record that what was begun is sent."""
        self.sent = len(self.begun)

    def cancel(self, numbers: list[int]) -> None:
        """Record the numbers."""
        self.cancelled += numbers


class FakeCosts:
    """Costs that the test sets."""

    def __init__(self) -> None:
        self.token_s: float | None = None
        self.pays = True
        self.asked: list[tuple[dict[str, int], int, int]] = []
        self.learnt: list[tuple[dict[str, int], int, float]] = []

    def computing_s(self, tokens: int) -> float | None:
        """Return how long computing takes."""
        return None if self.token_s is None else tokens * self.token_s

    def is_worth_fetching(self, by_tier: dict[str, int], ahead: int, tokens: int) -> bool:
        """Return what the test says."""
        self.asked.append((dict(by_tier), ahead, tokens))
        return self.pays

    def fetched(self, by_tier: dict[str, int], ahead: int, seconds: float) -> None:
        """Record what is learnt."""
        self.learnt.append((dict(by_tier), ahead, seconds))


class Rig:
    """The fetches of an engine, and a clock that the test moves."""

    def __init__(
        self, stop: StopRule = "timeout", drops: bool = False, host_blocks: int = 1000,
        alignment: int = PER_BLOCK, timeout_s: float = TIMEOUT_S, several: bool = False,
        span_blocks: int = 1,
    ) -> None:  # fmt: skip
        self.client, self.counts = Client(host_blocks, span_blocks), Counter[str]()
        self.costs = FakeCosts()
        groups = KVGroups(SEVERAL if several else SPACES, alignment, drops)
        self.now_s = 100.0
        self.fetches = FarFetches(
            self.client,  # type: ignore[arg-type]
            groups, PER_BLOCK, FetchRules(stop, timeout_s),
            lambda name, by: self.counts.update({name: by}),
            self.costs,  # type: ignore[arg-type]
        )  # fmt: skip

    def begin(
        self, request: RequestTransfers, found: Matched = FAR, is_tried: bool = True,
        blocks: int = BLOCKS,
    ) -> bool:  # fmt: skip
        """Begin the fetch of a request, if that pays."""
        return self.fetches.begin(
            request, found, blocks, is_tried, lambda n: PromptPart(request.prompt, n)
        )

    def waited_s(self, request: RequestTransfers) -> float:
        """Return how long a request waits, to a tenth of a second."""
        begin_s = self.now_s
        while self.fetches.waits(request):
            self.now_s += 0.1
            assert self.now_s < begin_s + WAIT_S_MAX + 1, "it waits for ever"
        self.fetches.stop(request, FAR)
        return round(self.now_s - begin_s, 1)

    def end(self, moved: int, number: int = 1, **more: Any) -> None:
        """End a fetch."""
        assert self.fetches.take(Done(number, "success", moved, **more))


@pytest.fixture
def rig(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Rig:
    """Return a rig, made with the test's parameters."""
    made = Rig(**getattr(request, "param", {}))
    clock = SimpleNamespace(monotonic=lambda: made.now_s)
    monkeypatch.setattr(module, "time", clock)
    return made


def asked(name: str = "a", local: int = 0, deadline_s: float | None = None) -> RequestTransfers:
    """Return a request that has some blocks on the device."""
    request = RequestTransfers(name, Prompt(1), 1, local_blocks=local)
    request.load_deadline_s = deadline_s
    return request


def test_a_prompt_waits_for_its_fetch_and_is_offered_what_arrived(rig: Rig) -> None:
    """A fetch begins behind what is here, takes over the match's hold, and is waited for."""
    request = asked()
    assert rig.begin(request)
    assert rig.client.begun == {1: (HERE, HERE + 8, HELD)}
    assert rig.client.sent == 1, "it begins at once"
    rig.now_s += 0.25
    assert rig.fetches.waits(request)
    rig.end(8, took_s=0.2)
    assert not rig.fetches.waits(request)
    rig.fetches.stop(request, Matched(2, HERE + 8, {}))
    assert rig.costs.asked == [({"remote": 8}, 0, 8 * PER_BLOCK)]
    assert rig.costs.learnt == [({"remote": 8}, 0, 0.2)]
    told = {"fetches": 1, "fetch_waits": 1, "fetch_wait_ms": 250, "fetched_blocks": 8}
    assert rig.counts == told
    assert not rig.begin(request, far(5, HERE + 8, 2))
    rig.fetches.finish(request)
    assert (rig.client.cancelled, rig.fetches.blocks_under_way) == ([], 0)


@pytest.mark.parametrize(
    ("rig", "token_s", "deadline_s", "waited_s"),
    [
        ({}, None, None, TIMEOUT_S),
        ({}, 0.05, None, 8 * PER_BLOCK * 0.05),
        ({}, 10.0, None, TIMEOUT_S),
        ({}, None, 0.7, 0.7),
        ({}, 0.01, 0.7, 0.4),
        ({"stop": "complete"}, 0.05, None, WAIT_S_MAX),
        ({"stop": "complete"}, None, 1.2, 1.2),
        ({"timeout_s": 3600.0}, None, None, WAIT_S_MAX),
    ],
    indirect=["rig"],
)
def test_how_long_a_prompt_waits(
    rig: Rig, token_s: float | None, deadline_s: float | None, waited_s: float
) -> None:
    """By the rule, no longer than computing takes, than the request allows, or than a minute."""
    rig.costs.token_s, request = token_s, asked(deadline_s=deadline_s)
    assert rig.begin(request)
    assert rig.waited_s(request) == pytest.approx(waited_s, abs=0.11)
    assert rig.counts["fetch_wait_ms"] == pytest.approx(1e3 * waited_s, abs=110)
    assert rig.client.cancelled == [], "it goes on, for later prompts"


@pytest.mark.parametrize("is_tried", [False, True])
def test_what_the_device_has_is_not_worth_waiting_for(rig: Rig, is_tried: bool) -> None:
    """A prompt waits no longer than computing takes what neither the device nor a tier here has."""
    rig.costs.token_s, request = 0.05, asked(local=HERE + 4 if is_tried else 0)
    assert rig.begin(request, is_tried=is_tried)
    request.local_blocks = HERE + 4
    assert rig.waited_s(request) == pytest.approx(4 * PER_BLOCK * 0.05, abs=0.11)


@pytest.mark.parametrize("rig", [{"stop": "best_effort"}], indirect=True)
def test_with_best_effort_a_prompt_waits_only_while_the_engine_cannot_run_it(rig: Rig) -> None:
    """A fetch begins on arrival only, and the prompt runs with what has arrived by its turn."""
    assert not rig.begin(asked())
    request = asked("b")
    assert rig.begin(request, is_tried=False)
    assert not rig.fetches.waits(request)
    rig.fetches.stop(request, Matched(2, HERE + 5, {}))
    rig.end(8)
    assert +rig.counts == {"fetches": 1, "fetched_blocks": 5, "late_fetched_blocks": 3}


def test_a_prompt_begins_to_wait_when_the_engine_would_run_it(rig: Rig) -> None:
    """The time that a prompt spends in the engine's queue is not counted as waiting."""
    request = asked(deadline_s=0.5)
    assert rig.begin(request, is_tried=False)
    rig.now_s += 1000.0
    assert rig.waited_s(request) == pytest.approx(0.5, abs=0.11)
    other = asked("b")
    assert rig.begin(other, is_tried=False)
    rig.end(8, 2)
    assert rig.waited_s(other) == 0
    assert rig.counts["fetch_waits"] == 1


@pytest.mark.parametrize(
    ("request_", "found"),
    [
        (asked(), Matched(1, HERE, {"host": HERE})),
        (asked(deadline_s=0.0), FAR),
        (asked(local=HERE + 8), FAR),
    ],
    ids=["nothing is far", "it may not wait", "the device has them"],
)
def test_what_brings_nothing_is_not_fetched(
    rig: Rig, request_: RequestTransfers, found: Matched
) -> None:
    """No fetch begins without far blocks, for a prompt that may not wait, or for nothing new."""
    for is_tried in (False, True):
        assert not rig.begin(request_, found, is_tried)
    assert (rig.client.begun, rig.costs.asked, +rig.counts) == ({}, [], {})


def test_a_fetch_that_does_not_pay_is_declined_once(rig: Rig) -> None:
    """A prompt whose blocks are computed faster is not asked about again."""
    rig.costs.pays, request = False, asked(local=5)
    assert not rig.begin(request)
    rig.costs.pays = True
    assert not rig.begin(request)
    assert rig.costs.asked == [({"remote": 8}, 0, 6 * PER_BLOCK)]
    assert +rig.counts == {"declined_far_blocks": 8}


@pytest.mark.parametrize("rig", [{"host_blocks": 10 * HOST_SHARE}], indirect=True)
def test_fetches_leave_most_of_host_memory_alone(rig: Rig) -> None:
    """A fetch is cut to what there is room for, and none begins without room."""
    assert rig.begin(asked("a"))
    assert rig.begin(asked("b"))
    assert [last - first for first, last, _ in rig.client.begun.values()] == [8, 2]
    assert rig.fetches.blocks_under_way == 10
    early = asked("c")
    assert not rig.begin(early, is_tried=False)
    assert not rig.begin(late := asked("d"))
    rig.end(8)
    assert rig.begin(early), "there is room again when it is tried"
    assert not rig.begin(late), "it was tried, and is being computed"
    assert rig.counts["declined_far_blocks"] == 16


def test_there_are_only_so_many_fetches(rig: Rig) -> None:
    """However many prompts wait, few requests of the server are under way for them."""
    small = far(1)
    begun = [rig.begin(asked(f"{n}"), small) for n in range(2 * FETCHES_MAX)]
    assert begun == [True] * FETCHES_MAX + [False] * FETCHES_MAX


@pytest.mark.parametrize("rig", [{"drops": True, "alignment": 2 * PER_BLOCK}], indirect=True)
def test_a_fetch_ends_where_a_hit_can(rig: Rig) -> None:
    """Blocks behind the last possible end of a hit are not fetched, but the one to drop is."""
    assert rig.begin(asked())
    assert rig.client.begun == {1: (HERE, 11, HELD)}
    assert not rig.begin(asked("b"), far(1, 4)), "no longer hit"
    assert rig.begin(asked("c"), FAR, blocks=10)
    assert rig.client.begun[2] == (HERE, 10, HELD)


def leaves_alone(blocks: int, leaves: int, coming: int = 0) -> Matched:
    """Return a match of a chain that is here, without leaves that are far."""
    fetched = {"remote": leaves}
    return Matched(HELD, 0, {}, far={"host": blocks}, coming=coming, fetched=fetched)


def test_leaves_are_what_a_fetch_costs_and_the_chain_what_it_wins() -> None:
    """The cost is that of the blocks of any group that are fetched, the gain that of the prefix."""
    rig = Rig(alignment=2 * PER_BLOCK, several=True)
    rig.costs.pays = False
    assert not rig.begin(asked("a"), leaves_alone(18, 3))
    assert rig.costs.asked == [({"remote": 3}, 0, 18 * PER_BLOCK)]
    assert +rig.counts == {"declined_far_blocks": 18}
    rig.costs.pays = True
    assert rig.begin(asked("b"), leaves_alone(18, 3))
    both = Matched(HELD, 4, {}, far={"remote": 6}, fetched={"remote": 6 + 2, "disk": 1})
    assert rig.begin(asked("c"), both)
    assert rig.costs.asked[1:] == [
        ({"remote": 3}, 0, 18 * PER_BLOCK),
        ({"remote": 8, "disk": 1}, 3, 6 * PER_BLOCK),
    ]
    assert rig.fetches.blocks_under_way == 3 + 9
    rig.end(18, 1, took_s=0.5)
    rig.end(4, 2, took_s=9.0)
    assert rig.costs.learnt == [({"remote": 3}, 0, 0.5)], "the other one was planned again"
    assert rig.begin(asked("d"), leaves_alone(18, 5, coming=2))
    assert rig.fetches.blocks_under_way == 3, "the others are another fetch's"


def test_a_fetch_of_leaves_takes_as_much_of_host_memory_as_they_need() -> None:
    """A fetch of all or nothing is declined only if the blocks that it brings do not fit."""
    rig = Rig(alignment=2 * PER_BLOCK, several=True, host_blocks=2 * 10)
    assert not rig.begin(asked("a"), leaves_alone(6, 11))
    assert rig.begin(asked("b"), leaves_alone(18, 10))
    assert rig.client.begun == {1: (0, 18, HELD)}, "all that is won, however long that is"
    assert not rig.begin(asked("c"), leaves_alone(18, 3, coming=2))
    assert rig.begin(asked("d"), leaves_alone(18, 3, coming=3)), "it needs no room"


@pytest.mark.parametrize("drops", [False, True])
@pytest.mark.parametrize(("room", "last"), [(0, None), (4, None), (5, 8), (12, 8), (13, 16)])
def test_a_fetch_for_which_there_is_no_room_is_cut_between_spans(
    room: int, last: int | None, drops: bool
) -> None:
    """Without the key of its last block no span is found, so a part of one is not asked for."""
    here = HERE - drops
    rig = Rig(host_blocks=HOST_SHARE * room, drops=drops, span_blocks=8)
    assert rig.begin(asked(), far(21, here), blocks=24) is (last is not None)
    expected = {} if last is None else {1: (here, last, HELD)}
    assert rig.client.begun == expected
    assert [sum(by_tier.values()) for by_tier, *_ in rig.costs.asked] == (
        [] if last is None else [last - HERE]
    )


@pytest.mark.parametrize("drops", [False, True])
def test_a_prompt_waits_for_what_it_gains_and_no_longer(
    drops: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks that are dropped behind a hit are computed anyhow, so nobody waits for these."""
    rig = Rig(drops=drops, timeout_s=60.0)
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: rig.now_s))
    rig.costs.token_s = 0.25
    assert rig.begin(asked("a"))
    assert rig.waited_s(asked("a")) == pytest.approx(8 * PER_BLOCK * 0.25, abs=0.11)


@pytest.mark.parametrize("drops", [False, True])
def test_the_end_of_a_prefix_of_several_groups_is_told(drops: bool) -> None:
    """The server learns which of the blocks to fetch are to be dropped behind the prefix."""
    rig = Rig(drops=drops, alignment=2 * PER_BLOCK, several=True)
    assert rig.begin(asked(), far(6, 4))
    assert (rig.client.begun, rig.client.drops) == ({1: (4, 10 + drops, HELD)}, [int(drops)])


def test_what_arrives_late_is_counted_and_learnt(rig: Rig) -> None:
    """A slow tier is known as slow only if its fetches are followed to their ends."""
    request = asked()
    assert rig.begin(request)
    rig.now_s += TIMEOUT_S
    assert not rig.fetches.waits(request)
    rig.fetches.stop(request, Matched(2, HERE + 2, {}))
    rig.end(7, took_s=5.0)
    assert rig.costs.learnt == [({"remote": 7}, 0, 5.0)]
    assert +rig.counts == {
        "fetches": 1, "fetch_waits": 1, "fetch_wait_ms": 2000, "fetched_blocks": 2,
        "late_fetched_blocks": 5, "missing_far_blocks": 1,
    }  # fmt: skip
    rig.fetches.finish(request)
    assert rig.client.cancelled == []


def test_only_fetches_that_fetch_all_their_blocks_tell_what_they_cost(rig: Rig) -> None:
    """Blocks that another fetch brings arrive sooner, and a fetch of nothing says nothing."""
    joins = far(8, coming=4)
    assert rig.begin(asked("a"))
    assert rig.begin(asked("b"), joins)
    assert rig.begin(asked("c"))
    assert [ahead for _, ahead, _ in rig.costs.asked] == [0, 8 - 4, 8 + 4]
    for number, moved in ((1, 0), (2, 8), (3, 8)):
        rig.end(moved, number, took_s=1.0)
    assert rig.costs.learnt == [({"remote": 8}, 12, 1.0)]


def test_a_prompt_that_is_over_fetches_no_more(rig: Rig) -> None:
    """A fetch is cancelled when its prompt is aborted, and its end is nobody's loss."""
    request = asked()
    assert rig.begin(request)
    rig.now_s += 0.5
    rig.fetches.finish(request)
    assert rig.client.cancelled == [1]
    assert rig.fetches.take(Done(1, "cancelled", 3))
    assert not rig.fetches.take(Done(1, "cancelled", 3))
    assert not rig.fetches.take(Done(99, "success", 3))
    assert +rig.counts == {
        "fetches": 1, "fetch_waits": 1, "fetch_wait_ms": 500, "late_fetched_blocks": 3
    }  # fmt: skip
    assert rig.fetches.blocks_under_way == 0


def test_after_a_reset_nobody_waits(rig: Rig) -> None:
    """Blocks from before a reset are wanted by nobody, and their ends are not counted."""
    requests = [asked("a"), asked("b")]
    assert all(rig.begin(request) for request in requests)
    rig.end(8)
    rig.fetches.give_up_all()
    assert rig.client.cancelled == [2]
    assert not any(rig.fetches.waits(request) for request in requests)
    rig.end(0, 2)
    assert rig.counts["missing_far_blocks"] == 0


@pytest.mark.parametrize("seed", range(40))
def test_whatever_happens_nothing_is_left_and_nobody_waits_too_long(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prompts arrive, are tried, preempted and aborted; fetches end early, late, or not at all."""
    chance = Random(seed)
    stop = chance.choice(["best_effort", "complete", "timeout"])
    rig = Rig(stop, host_blocks=chance.choice([40, 1000]))
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: rig.now_s))
    rig.costs.token_s = chance.choice([None, 0.01])
    requests: dict[str, RequestTransfers] = {}
    waiting_since: dict[str, float] = {}
    under_way, dropped, made = dict[int, int](), set[int](), 0
    for _ in range(400):
        rig.now_s += chance.choice([0.0, 0.01, 0.5])
        what = chance.random()
        if what < 0.3 or not requests:
            made += 1
            request = asked(f"{made}", chance.randint(0, 12), chance.choice([None, None, 0.0, 0.3]))
            requests[request.request_id] = request
            before = len(rig.client.begun)
            found = far(chance.randint(0, 12))
            rig.begin(request, found, chance.random() < 0.5)
            assert len(rig.client.begun) - before <= 1
        elif what < 0.7:
            request = chance.choice(list(requests.values()))
            if rig.fetches.waits(request):
                since_s = waiting_since.setdefault(request.request_id, rig.now_s)
                assert stop != "best_effort"
                assert rig.now_s < since_s + WAIT_S_MAX
                assert request.load_deadline_s is None or rig.now_s < since_s + 0.3
            else:
                rig.fetches.stop(request, Matched(1, HERE + chance.randint(0, 4), {}))
                assert not rig.fetches.waits(request), "it waits again"
        elif what < 0.8:
            request = requests.pop(chance.choice(list(requests)))
            rig.fetches.finish(request)
        elif what < 0.82:
            rig.fetches.give_up_all()
        under_way = {n: last - first for n, (first, last, _) in rig.client.begun.items()}
        under_way = {n: blocks for n, blocks in under_way.items() if n not in dropped}
        assert rig.fetches.blocks_under_way == sum(under_way.values())
        if under_way and chance.random() < 0.3:
            number = chance.choice(list(under_way))
            dropped.add(number)
            moved = 0 if number in rig.client.cancelled else chance.randint(0, under_way[number])
            rig.end(moved, number)
    for number in set(under_way) - dropped:
        rig.end(0, number)
    for request in requests.values():
        assert not rig.fetches.waits(request)
        rig.fetches.finish(request)
    assert rig.fetches.blocks_under_way == 0
    assert rig.fetches._of_request == {}
    blocks = sum(last - first for first, last, _ in rig.client.begun.values())
    told = rig.counts
    ends = ("fetched_blocks", "late_fetched_blocks", "missing_far_blocks")
    assert 0 <= sum(told[name] for name in ends) <= blocks
    assert all(told[name] >= 0 for name in told)
