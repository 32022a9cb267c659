"""A Mooncake Store of models with several KV groups: their leaves are looked up, as spans are."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator, Iterable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from flexkv.common.request import Operation
from flexkv.common.terms import BlockKey, Tier
from flexkv.index.hints import STORE
from flexkv.index.keys import block_keys, leaf_keys
from flexkv.kvmanager import KVManager
from flexkv.tiers import remote_lookups
from flexkv.tiers.remote import RemoteTier
from tests.mooncake import Mooncake, running

from .group_rig import GROUPS, PROMPT, GroupRig
from .groups import MODEL, cache_config
from .test_group_remote import BLOCKS, CHUNK, END, PREFIXES, STATE, WINDOW, moved_end, needed

EVERY = BLOCKS + BLOCKS + BLOCKS + BLOCKS // 2
"""The blocks of all groups of the prompt."""


@pytest.fixture
def remote(tmp_path: Path, mooncake: Mooncake, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Return the keys of an engine whose pool nobody else uses.

    Its loads wait for the store's answer, however busy this machine is.
    """
    monkeypatch.setattr(remote_lookups, "WAIT_S", 30.0)
    return {
        "num_ssd_blocks": 0,
        "use_mooncake_store_backend": True,
        "mooncake_store_config_path": mooncake.file(tmp_path),
        "key_secret": secrets.token_hex(16),
    }


def tier_of(rig: GroupRig) -> RemoteTier:
    """Return the remote tier of an engine."""
    tier = rig.manager.engine._backend.remote  # type: ignore[attr-defined]
    assert isinstance(tier, RemoteTier)
    return tier


@asynccontextmanager
async def engine(folder: Path, remote: dict[str, Any]) -> AsyncIterator[GroupRig]:
    """Yield an engine that has joined the pool."""
    async with KVManager(MODEL, cache_config(folder, **remote)) as manager:
        rig = GroupRig(manager)
        pool = tier_of(rig).pool
        assert pool is not None
        await pool.joined()
        yield rig
        manager.engine.residency.validate()


@asynccontextmanager
async def pair(folder: Path, remote: dict[str, Any]) -> AsyncIterator[tuple[GroupRig, GroupRig]]:
    """Yield an engine that has stored the prompt, and one that knows nothing of the store."""
    async with engine(folder, remote) as first:
        await first.put(PROMPT)
        assert (await first.manager.flush()).lacking_blocks == {}
        async with engine(folder, remote) as second:
            second.stored = first.stored
            yield first, second


def keys_of(rig: GroupRig, of: Mapping[int, Iterable[int]]) -> list[BlockKey]:
    """Return the keys of some blocks of the prompt: positions in the chain, by group."""
    keys = rig.manager.engine.requests.intake(Operation.PREFETCH, PROMPT).keys
    return [block_keys(leaf_keys(keys, group))[at] for group, some in of.items() for at in some]


async def lose(rig: GroupRig, keys: Iterable[BlockKey]) -> None:
    """Remove blocks from the store, of which the engine is not told."""
    requests, pool = tier_of(rig).requests, tier_of(rig).pool
    assert requests is not None
    assert pool is not None
    current = await pool.joined()
    for key in keys:
        await requests.store.delete(current.object_name(key))


def fetches(rig: GroupRig) -> tuple[int, int]:
    """Return how many blocks came from the store, and how many fetches failed."""
    routes = rig.manager.statistics().routes
    fetched = routes.get("remote→host")
    return (0, 0) if fetched is None else (fetched.blocks, fetched.failed_ops)


async def test_what_one_engine_stores_another_loads(tmp_path: Path, remote: dict[str, Any]) -> None:
    """Each block is an object of its own; a first get asks for the chain, and then for leaves."""
    async with pair(tmp_path, remote) as (first, second):
        assert first.manager.statistics().missing_tiers == {}
        stored = first.manager.statistics().routes["host→remote"]
        assert (stored.blocks, stored.failed_ops) == (EVERY, 0)
        places = second.everything(PROMPT)
        assert moved_end(await second.get(PROMPT, places)) == END
        second.check(places, END)
        assert fetches(second) == (sum(map(len, needed(END).values())), 0)
        assert second.manager.statistics().stores["remote"].requests.requests["exist"] == 2
        await second.manager.flush()
        assert "host→remote" not in second.manager.statistics().routes


async def test_a_match_finds_leaves_that_an_earlier_one_has_asked_for(
    tmp_path: Path, remote: dict[str, Any]
) -> None:
    """A match waits for nothing; once the store has answered, all is said to be far."""
    async with pair(tmp_path, remote) as (_, second):
        assert second.manager.match(PROMPT).far_tokens_by_tier == {}
        async with asyncio.timeout(30):
            while not (far := second.manager.match(PROMPT).far_tokens_by_tier):  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        assert far == {Tier.REMOTE: END}
        assert second.manager.statistics().stores["remote"].requests.requests["exist"] == 2
        await second.manager.prefetch(PROMPT)
        assert second.manager.match(PROMPT).tokens == END


async def test_leaves_alone_are_fetched_to_a_chain_that_is_here(
    tmp_path: Path, remote: dict[str, Any]
) -> None:
    """Where an engine has the chain without its leaves, only these are asked for, and come."""
    async with pair(tmp_path, remote) as (_, second):
        await second.put(PROMPT, (0,))
        places = second.everything(PROMPT)
        assert moved_end(await second.get(PROMPT, places)) == END
        second.check(places, END)
        assert fetches(second) == (sum(len(of) for group, of in needed(END).items() if group), 0)
        assert second.manager.statistics().stores["remote"].requests.requests["exist"] == 1


@pytest.mark.parametrize("is_hinted", [False, True], ids=["unknown", "hinted"])
@pytest.mark.parametrize("group", GROUPS)
async def test_a_block_that_is_gone_cuts_the_answer(
    tmp_path: Path, remote: dict[str, Any], group: int, is_hinted: bool
) -> None:
    """A prefix that is whole without the block comes, whether or not a hint still names it."""
    at = needed(END)[group][-1]
    expected = max(end for end in PREFIXES if at not in needed(end)[group])
    async with pair(tmp_path, remote) as (first, second):
        await lose(first, keys_of(first, {group: [at]}))
        if is_hinted:
            every = dict.fromkeys((0, WINDOW, CHUNK), range(BLOCKS)) | {STATE: range(1, BLOCKS, 2)}
            hints = tier_of(second).catalogue._hints  # type: ignore[attr-defined]
            hints.note(STORE, b"".join(keys_of(second, every)))
        places = second.everything(PROMPT)
        assert moved_end(await second.get(PROMPT, places)) == expected
        second.check(places, expected)
        failed = fetches(second)[1]
        assert (failed > 0) == is_hinted
        assert moved_end(await second.get(PROMPT, places)) == expected
        assert fetches(second)[1] == failed


async def test_a_store_that_was_restarted_empty_is_used_again(
    remote: dict[str, Any], tmp_path: Path
) -> None:
    """What is gone is not loaded, hints of the prompt's leaves go too, and all is stored again."""
    with running() as own:
        remote["mooncake_store_config_path"] = own.file(tmp_path)
        async with engine(tmp_path, remote) as node:
            await node.put(PROMPT)
            await node.manager.flush()
            own.restart()
            node.manager.clear(Tier.HOST)
            places = node.everything(PROMPT)
            async with asyncio.timeout(60):
                while node.manager.statistics().stores["remote"].known_spans:
                    assert moved_end(await node.get(PROMPT, places)) == 0
                    await asyncio.sleep(0.01)
                while node.manager.statistics().stores["remote"].known_spans < EVERY:
                    await node.put(PROMPT)
                    await node.manager.flush()
