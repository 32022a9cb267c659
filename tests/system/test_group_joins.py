"""Loads of models with several KV groups that need what others are loading from SSD."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest

from flexkv.common.config import Settings
from flexkv.common.errors import CorruptBlockError, DeadlineError
from flexkv.common.request import KVResponse, KVResponseStatus
from flexkv.common.terms import Tier
from flexkv.kvmanager import KVManager
from tests.system.mounted import mounted_disk

from .forked import forked_server
from .group_rig import GROUPS, PROMPT, GroupRig, fill
from .groups import MODEL, Ids, cache_config
from .test_kv_groups import corrupt

PATIENCE_S = 20.0
SECOND = 45
"""The first device block of the second get."""


def tokens_of(response: KVResponse) -> int:
    """Return how many tokens a response has, from the first on."""
    count = int(np.count_nonzero(response.return_mask))
    assert response.return_mask[:count].all()
    return count


async def on_ssd(rig: GroupRig) -> int:
    """Put the prompt, move it to SSD; return how many blocks a get of it reads."""
    await rig.put(PROMPT)
    await rig.manager.flush()
    await fill(rig)
    return sum(len(rig.caches.needed(group, 40)) for group in GROUPS)


def read_blocks(rig: GroupRig) -> int:
    """Return how many blocks were read from the SSD so far."""
    route = rig.manager.statistics().routes.get("disk→host")
    return 0 if route is None else route.blocks


async def until(is_so: Callable[[], bool]) -> None:
    """Wait until a condition holds."""
    async with asyncio.timeout(PATIENCE_S):
        while not is_so():  # noqa: ASYNC110
            await asyncio.sleep(0.01)


async def test_gets_at_once_bring_the_whole_prefix_and_read_it_once(tmp_path: Path) -> None:
    """Three gets of one prompt at the same time each bring all of it; each block is read once."""
    async with KVManager(MODEL, cache_config(tmp_path)) as manager:
        rig = GroupRig(manager)
        wanted = await on_ssd(rig)
        before = read_blocks(rig)
        all_places = [rig.caches.places(40, start) for start in (10, 30, 50)]
        responses = await asyncio.gather(*(rig.get(PROMPT, places) for places in all_places))
        for places, response in zip(all_places, responses, strict=True):
            assert (tokens_of(response), response.error) == (40, None)
            rig.check(places, 40)
        assert read_blocks(rig) - before == wanted
        statistics = manager.statistics()
        assert statistics.requests["get"] == {"success": 3}
        assert statistics.hit_blocks["disk"] == 10
        assert statistics.hit_blocks["host"] == 20


@pytest.mark.parametrize("prompt", [PROMPT, PROMPT[:24]], ids=len)
async def test_a_get_joins_a_prefetch(tmp_path: Path, prompt: np.ndarray) -> None:
    """A get of a prompt that is being prefetched, or of its beginning, waits for what it needs."""
    async with KVManager(MODEL, cache_config(tmp_path)) as manager:
        rig = GroupRig(manager)
        await on_ssd(rig)
        places = rig.everything(prompt)
        prefetched, got = await asyncio.gather(manager.prefetch(PROMPT), rig.get(prompt, places))
        assert (tokens_of(prefetched), tokens_of(got)) == (40, len(prompt))
        rig.check(places, len(prompt))


async def test_a_get_joins_a_put(tmp_path: Path) -> None:
    """A get of what a put is storing waits for it; a match counts it as pending."""
    async with KVManager(MODEL, cache_config(tmp_path)) as manager:
        rig = GroupRig(manager)
        putting = asyncio.ensure_future(rig.put(PROMPT))
        while not manager.engine.scheduler.flights:  # noqa: ASYNC110
            await asyncio.sleep(0)
        match = manager.match(PROMPT)
        assert (match.tokens, match.pending_tokens) == (40, 40)
        places = rig.everything(PROMPT)
        got = await rig.get(PROMPT, places)
        assert tokens_of(got) == 40
        assert (await putting).return_mask.all()
        rig.check(places, 40)


@pytest.mark.parametrize("group", GROUPS)
async def test_gets_that_join_a_failing_one_are_planned_anew(tmp_path: Path, group: int) -> None:
    """If a block of any group is corrupt, the get that reads it fails; the other is shorter."""
    async with KVManager(MODEL, cache_config(tmp_path)) as manager:
        rig = GroupRig(manager)
        await corrupt(rig, tmp_path, group)
        first, second = rig.everything(PROMPT), rig.caches.places(40, SECOND)
        failed, joined = await asyncio.gather(rig.get(PROMPT, first), rig.get(PROMPT, second))
        assert (failed.status, tokens_of(failed)) == (KVResponseStatus.NOTFOUND, 0)
        assert isinstance(failed.error, CorruptBlockError)
        assert (tokens_of(joined), joined.error) == (32, None)
        rig.check(second, 32)
        assert manager.statistics().corrupt_blocks == 1
        assert manager.statistics().requests["get"] == {"notfound": 1, "success": 1}


async def test_a_get_that_joins_a_cancelled_one_goes_on(tmp_path: Path) -> None:
    """What a cancelled get has begun to read is read to its end for the get that waits for it."""
    async with KVManager(MODEL, cache_config(tmp_path)) as manager:
        rig = GroupRig(manager)
        await on_ssd(rig)
        first = asyncio.ensure_future(rig.get(PROMPT, rig.everything(PROMPT)))
        await asyncio.sleep(0)
        places = rig.caches.places(40, SECOND)
        second = asyncio.ensure_future(rig.get(PROMPT, places))
        await asyncio.sleep(0)
        first.cancel()
        with suppress(asyncio.CancelledError):
            await first
        assert tokens_of(await second) == 40
        rig.check(places, 40)
        await manager.engine.scheduler.wait_idle()
        assert not manager.engine.residency.claims
        manager.engine.residency.validate()


async def test_gets_through_a_server_join(tmp_path: Path) -> None:
    """Gets of a client in another process join, too."""
    cache = cache_config(tmp_path)
    address = f"ipc://{tmp_path}/socket"
    settings = Settings(
        server_recv_port=address, server_client_mode=True, server_answer_ms=60_000,
        cache_config=cache,
    )  # fmt: skip
    server = forked_server(settings, MODEL)
    async with KVManager(MODEL, cache, settings=settings) as manager:
        rig = GroupRig(manager)
        wanted = await on_ssd(rig)
        before = read_blocks(rig)
        all_places = [rig.everything(PROMPT), rig.caches.places(40, SECOND)]
        responses = await asyncio.gather(*(rig.get(PROMPT, places) for places in all_places))
        for places, response in zip(all_places, responses, strict=True):
            assert tokens_of(response) == 40
            rig.check(places, 40)
        assert read_blocks(rig) - before == wanted
    server.close()
    assert server.exit_status == 0


# -- a disk that is slow or hangs ----------------------------------------------------------------


async def begun(rig: GroupRig, *all_places: list[Ids]) -> list[asyncio.Future[KVResponse]]:
    """Begin gets, and wait until all of them are planned."""
    gets = [asyncio.ensure_future(rig.get(PROMPT, places)) for places in all_places]
    await until(lambda: rig.manager.engine.scheduler.flights == len(all_places))
    return gets


async def test_a_slow_disk_is_read_once(tmp_path: Path) -> None:
    """While a disk does not answer, gets wait; then each brings all, and no block is read twice."""
    with mounted_disk(tmp_path) as disk:
        async with KVManager(MODEL, cache_config(disk.mounted)) as manager:
            rig = GroupRig(manager)
            wanted = await on_ssd(rig)
            before = read_blocks(rig)
            disk.suffers_from("hang")
            all_places = [rig.caches.places(40, start) for start in (10, 30, 50)]
            gets = await begun(rig, *all_places)
            found = manager.match(PROMPT)
            assert (found.tokens, found.pending_tokens) == (40, 40)
            assert not any(get.done() for get in gets)
            disk.suffers_from("")
            for places, response in zip(all_places, await asyncio.gather(*gets), strict=True):
                assert tokens_of(response) == 40
                rig.check(places, 40)
            assert read_blocks(rig) - before == wanted


async def test_gets_that_wait_for_a_disk_that_hangs_end_in_time(tmp_path: Path) -> None:
    """At the deadline all gets end without a block; once the disk answers, gets succeed again."""
    with mounted_disk(tmp_path) as disk:
        async with KVManager(MODEL, cache_config(disk.mounted, io_deadline_s=0.3)) as manager:
            rig = GroupRig(manager)
            await on_ssd(rig)
            disk.suffers_from("hang")
            first, second = rig.everything(PROMPT), rig.caches.places(40, SECOND)
            async with asyncio.timeout(PATIENCE_S):
                failed, joined = await asyncio.gather(*await begun(rig, first, second))
            assert isinstance(failed.error, DeadlineError)
            assert (tokens_of(failed), tokens_of(joined)) == (0, 0)
            assert manager.match(PROMPT).tokens == 0
            disk.suffers_from("")
            await until(lambda: manager.statistics().tiers["disk"].reads == "up")
            assert tokens_of(await rig.get(PROMPT, first)) == 40
            rig.check(first, 40)
            assert manager.engine.residency.counts(Tier.HOST).pinned == 0
