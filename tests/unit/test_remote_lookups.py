"""Lookups in a store that cannot be listed, and the hints that its answers make."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any, cast

import numpy as np

from flexkv.common.errors import MissingBlockError, RemoteError
from flexkv.common.terms import BlockNames, Positions, Route, Tier, Transfer
from flexkv.index.hints import STORE
from flexkv.io.remote.names import Pool
from flexkv.tiers.remote_lookups import COUNTS_S, WAIT_S, Lookups
from tests.remote_rigs import POOL, PROMPT, span_key
from tests.unit.lookups_rig import BLOCKS, SILENT_S, G, Rig, sought, with_rig


def test_what_no_hint_names_is_asked_for() -> None:
    """A match waits for nothing; the next one knows what the store has, in one request."""

    async def work(rig: Rig) -> None:
        rig.has(0, 1, 2)
        assert rig.far() == 0
        await asyncio.sleep(0.01)
        assert rig.far() == 3 * G
        await asyncio.sleep(0.01)
        assert rig.store.asked == [5]

    with_rig(work)


def test_an_answer_counts_for_some_seconds() -> None:
    """Matches of one prompt ask once; later, what others have stored meanwhile is found."""

    async def work(rig: Rig) -> None:
        for _ in range(20):
            assert rig.far() == 0
            await asyncio.sleep(0.1)
        assert rig.store.asked == [5]
        rig.has(0)
        await asyncio.sleep(COUNTS_S)
        rig.far()
        await asyncio.sleep(0.1)
        assert rig.far() == G

    with_rig(work)


def test_only_whole_spans_behind_what_is_known_are_asked_for() -> None:
    """Spans that hints name, or that the prompt does not fill, are in no lookup."""

    async def work(rig: Rig) -> None:
        rig.hints.note(STORE, span_key(0) + span_key(1))
        assert rig.far(1, 4 * G + 1) == 2 * G - 1
        await asyncio.sleep(0.01)
        assert rig.store.asked == [2]
        assert rig.far(4 * G + 1, BLOCKS - 1) == 0
        await asyncio.sleep(0.01)
        assert rig.store.asked == [2]

    with_rig(work)


def test_a_load_waits_for_the_answer() -> None:
    """What a load may wait for ends with the answer; then hints have it."""

    async def work(rig: Rig) -> None:
        rig.has(0, 1)
        rig.store.takes_s = WAIT_S / 2
        answered = rig.lookups.look_up(sought())
        assert answered is not None
        await answered
        assert rig.known() == [0, 1]

    with_rig(work)


def test_loads_do_not_wait_for_a_slow_store() -> None:
    """The first load waits for a moment only, the others not at all, until the store answers."""

    async def work(rig: Rig) -> None:
        rig.store.takes_s = 1.0
        begin_s = asyncio.get_running_loop().time()
        first = rig.lookups.look_up(sought())
        assert first is not None
        await first
        assert asyncio.get_running_loop().time() - begin_s == WAIT_S
        assert rig.lookups.look_up(sought(G)) is None
        rig.store.takes_s = 0.0
        await asyncio.sleep(2 * COUNTS_S)
        again = rig.lookups.look_up(sought())
        assert again is not None
        await again

    with_rig(work)


def test_an_answer_that_comes_late_is_heard() -> None:
    """A store that needs a long time for each answer is heard, and is asked once."""

    async def work(rig: Rig) -> None:
        rig.has(0, 1)
        rig.store.takes_s = 0.9 * SILENT_S
        for _ in range(int(SILENT_S)):
            rig.far()
            await asyncio.sleep(1)
        assert rig.far() == 2 * G
        assert rig.store.asked[0] == 5
        assert rig.requests.counts().failures == {}

    with_rig(work)


def test_a_store_that_is_slow_for_each_span_is_asked_for_fewer() -> None:
    """Questions get smaller until they are answered in time, and larger once answers are fast."""

    async def work(rig: Rig) -> None:
        rig.has(0, 1, 2)
        rig.store.each_s = 0.6 * SILENT_S
        for _ in range(20):
            rig.far()
            await asyncio.sleep(COUNTS_S)
        assert rig.known() == [0, 1, 2]
        assert rig.store.asked[:2] == [5, 2]
        assert set(rig.store.asked[2:]) == {1}
        rig.store.each_s = 0.0
        for _ in range(5):
            rig.far()
            await asyncio.sleep(2 * COUNTS_S)
        rig.lookups.ask_again([span_key(span) for span in range(5)])
        await asyncio.sleep(0.01)
        assert rig.store.asked[-1] == 5

    with_rig(work)


def test_loads_do_not_wait_for_a_store_that_fails() -> None:
    """After an error nobody waits, and nothing is known."""

    async def work(rig: Rig) -> None:
        rig.store.error = RemoteError("a store", "exist", "broken")
        rig.far()
        await asyncio.sleep(0.01)
        assert rig.lookups.look_up(sought(G)) is None
        assert rig.known() == []

    with_rig(work)


def test_nobody_waits_without_a_pool() -> None:
    """Before the store has answered at all, a load does not wait for it."""

    async def work(rig: Rig) -> None:
        rig.pool.current = None
        assert Lookups(
            rig.store, cast("Any", SimpleNamespace()), rig.pool, rig.hints, SILENT_S
        ).look_up(sought()) is None  # fmt: skip
        rig.pool.current = POOL

    with_rig(work)


def test_an_answer_about_a_pool_that_was_left_is_no_hint() -> None:
    """If a clear comes while the store is being asked, what was there before is not noted."""

    async def work(rig: Rig) -> None:
        rig.has(0, 1)
        rig.store.takes_s = 0.5
        rig.far()
        await asyncio.sleep(0.1)
        rig.pool.current = Pool(POOL.description)
        await asyncio.sleep(1)
        assert rig.store.asked == [5]
        assert rig.known() == []

    with_rig(work)


def test_a_missing_span_makes_the_others_doubtful() -> None:
    """After a miss the store is asked at once for the rest, and hints of what is gone go."""

    async def work(rig: Rig) -> None:
        rig.hints.note(STORE, b"".join(map(span_key, range(5))))
        rig.has(0, 3)
        places = np.arange(BLOCKS - G)
        names = BlockNames(PROMPT, Positions(G, BLOCKS - G))
        route = Route(Tier.REMOTE, Tier.HOST)
        lost = Transfer(1, 0, route, places * 0, places, names=names)
        error = MissingBlockError(1, str(route), 1, "gone")
        rig.catalogue.doubt(lost, error)
        assert rig.known() == [0, 2, 3, 4]
        await asyncio.sleep(0.01)
        assert rig.known() == [0, 3]
        assert rig.store.asked == [4]

    with_rig(work)


def test_a_tier_that_is_down_is_not_asked() -> None:
    """A match that must avoid the tier asks nothing."""

    async def work(rig: Rig) -> None:
        assert rig.catalogue.far(PROMPT, 0, BLOCKS, {Tier.REMOTE}) == ()
        await asyncio.sleep(0.01)
        assert rig.store.asked == []

    with_rig(work)
