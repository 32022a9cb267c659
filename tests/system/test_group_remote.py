"""The remote tier of models with several KV groups: prefixes come whole, or shorter, never wrong.

One engine stores prompts, and another one with empty tiers of its own loads them.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from typer.testing import CliRunner

from flexkv.cli.main import commands
from flexkv.common.request import KVResponse, Operation
from flexkv.common.terms import BLOCK_KEY_BYTES, Tier
from flexkv.engine.runner import AGAIN_MAX
from flexkv.index.hints import STORE
from flexkv.index.keys import block_keys, leaf_keys
from flexkv.kvmanager import KVManager

from .group_rig import GROUPS, PROMPT, GroupRig
from .groups import MODEL, PER_BLOCK, GroupCaches, cache_config

END = len(PROMPT)
BLOCKS = END // PER_BLOCK
WINDOW, CHUNK, STATE = 1, 2, 3
PREFIXES = range(8, END + 1, 8)
"""Where prefixes can end, in tokens."""


def needed(end: int) -> dict[int, list[int]]:
    """Return the positions in the chain of all that a prefix of `end` tokens needs, by group."""
    spaces = GroupCaches().spaces
    of = {0: list(range(end // PER_BLOCK))}
    for group in (WINDOW, CHUNK, STATE):
        ratio = spaces[group].tokens_per_block // PER_BLOCK
        of[group] = [(own + 1) * ratio - 1 for own in range(*spaces[group].needed(end))]
    return of


@asynccontextmanager
async def engine(folder: Path, **changes: Any) -> AsyncIterator[GroupRig]:
    """Yield an engine without an SSD over the directory that all engines of a test share."""
    remote = {"num_ssd_blocks": 0, "enable_remote": True, "remote_list_per_s": 0.0,
              "remote_cache_path": f"file://{folder}/shared", **changes}  # fmt: skip
    async with KVManager(MODEL, cache_config(folder, **remote)) as manager:
        yield GroupRig(manager)
        manager.engine.residency.validate()


async def listed(rig: GroupRig) -> None:
    """Wait until the store was listed."""
    async with asyncio.timeout(30):
        while not rig.manager.statistics().stores["remote"].listed_rounds:  # noqa: ASYNC110
            await asyncio.sleep(0.01)


@asynccontextmanager
async def pair(folder: Path, **changes: Any) -> AsyncIterator[tuple[GroupRig, GroupRig]]:
    """Yield an engine that has stored a prompt, and one that has listed the store."""
    async with engine(folder, **changes) as first:
        await first.put(PROMPT)
        report = await first.manager.flush()
        assert report.lacking_blocks == {}
        async with engine(folder) as second:
            second.stored = first.stored
            await listed(second)
            yield first, second


def objects(
    rig: GroupRig, folder: Path, of: Mapping[int, Iterable[int]], prompt: Any = PROMPT
) -> list[Path]:
    """Return the objects of some blocks of a prompt: positions in the chain, by group."""
    keys = rig.manager.engine.requests.intake(Operation.PREFETCH, prompt).keys
    there = {path.name: path for path in (folder / "shared").rglob("*")}
    size = BLOCK_KEY_BYTES
    return [
        there[leaf_keys(keys, group)[(at + 1) * size : (at + 2) * size].hex()]
        for group, positions in of.items()
        for at in positions
    ]


def moved_end(response: KVResponse) -> int:
    """Return how many tokens a response says were moved: the first ones."""
    count = int(np.count_nonzero(response.return_mask))
    assert response.return_mask[:count].all()
    return count


async def test_what_one_engine_stores_another_loads(tmp_path: Path) -> None:
    """Each block of each group is an object of its own, and a get brings all that it needs."""
    async with pair(tmp_path) as (first, second):
        stored = first.manager.statistics().routes["host→remote"]
        every = BLOCKS + BLOCKS + BLOCKS + BLOCKS // 2
        assert (stored.blocks, stored.failed_ops) == (every, 0)
        assert second.manager.statistics().stores["remote"].known_spans == every
        places = second.everything(PROMPT)
        assert moved_end(await second.get(PROMPT, places)) == END
        second.check(places, END)
        fetched = second.manager.statistics().routes["remote→host"]
        assert fetched.blocks == sum(map(len, needed(END).values()))
        await second.manager.flush()
        assert "host→remote" not in second.manager.statistics().routes


async def test_a_prefetch_brings_all_that_a_get_needs(tmp_path: Path) -> None:
    """After a prefetch a get finds all in host memory; before it, a match finds all far."""
    async with pair(tmp_path) as (_, second):
        before = second.manager.match(PROMPT)
        assert (before.tokens, before.far_tokens_by_tier) == (0, {Tier.REMOTE: END})
        await second.manager.prefetch(PROMPT)
        assert second.manager.match(PROMPT).tokens == END
        fetched = second.manager.statistics().routes["remote→host"].blocks
        places = second.everything(PROMPT)
        assert moved_end(await second.get(PROMPT, places)) == END
        second.check(places, END)
        assert second.manager.statistics().routes["remote→host"].blocks == fetched


async def test_leaves_alone_are_fetched_to_a_chain_that_is_here(tmp_path: Path) -> None:
    """Where an engine has the chain without its leaves, only these come from the store."""
    async with pair(tmp_path) as (_, second):
        await second.put(PROMPT, (0,))
        places = second.everything(PROMPT)
        assert moved_end(await second.get(PROMPT, places)) == END
        second.check(places, END)
        fetched = second.manager.statistics().routes["remote→host"]
        assert fetched.blocks == sum(len(of) for group, of in needed(END).items() if group)


def lose(path: Path, fault: str) -> None:
    """Spoil an object."""
    if fault == "missing":
        path.unlink()
    elif fault == "flipped":
        content = bytearray(path.read_bytes())
        content[7] ^= 1
        path.write_bytes(content)
    else:
        path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize("fault", ["missing", "flipped", "cut"])
@pytest.mark.parametrize("group", GROUPS)
async def test_a_block_that_does_not_arrive_cuts_the_answer(
    tmp_path: Path, group: int, fault: str
) -> None:
    """A prefix that is whole without the block comes, with right bytes; its hint is dropped."""
    at = needed(END)[group][-1]
    expected = max([end for end in PREFIXES if at not in needed(end)[group]], default=0)
    async with pair(tmp_path) as (first, second):
        known = second.manager.statistics().stores["remote"].known_spans
        (path,) = objects(first, tmp_path, {group: [at]})
        lose(path, fault)
        places = second.everything(PROMPT)
        assert moved_end(await second.get(PROMPT, places)) == expected
        second.check(places, expected)
        assert 0 < expected < END
        store = second.manager.statistics().stores["remote"]
        assert store.known_spans == known - 1
        assert not path.exists()  # what is wrong is deleted
        assert store.requests.deleted == (fault != "missing")
        # The second engine does not ask for it again; the first one, which has it, stores it again.
        failed = second.manager.statistics().routes["remote→host"].failed_ops
        assert moved_end(await second.get(PROMPT, places)) == expected
        assert second.manager.statistics().routes["remote→host"].failed_ops == failed


@asynccontextmanager
async def misled(
    tmp_path: Path, prompt: NDArray[np.int64], here: int, missing: int
) -> AsyncIterator[GroupRig]:
    """Yield an engine whose hints name states that the store has lost: the last so many.

    It has the first `here` tokens in host memory.
    """
    async with engine(tmp_path) as first:
        await first.put(prompt)
        await first.manager.flush()
        positions = range(1, len(prompt) // PER_BLOCK, 2)[-missing:]
        for path in objects(first, tmp_path, {STATE: positions}, prompt):
            path.unlink()
        async with engine(tmp_path) as second:
            await listed(second)
            # The store was listed before they were deleted.
            keys = second.manager.engine.requests.intake(Operation.PREFETCH, prompt).keys
            hints = second.manager.engine.planner.catalogue._hints  # type: ignore[attr-defined]
            hints.note(STORE, b"".join(block_keys(leaf_keys(keys, STATE))))
            second.stored = first.stored
            await second.put(prompt[:here])
            yield second


async def test_wrong_hints_cost_no_hit_of_what_is_here(tmp_path: Path) -> None:
    """A get whose far blocks fail again and again finally loads what host memory has."""
    long, here = np.arange(5000, 5080), 16
    async with misled(tmp_path, long, here, missing=len(long)) as second:
        places = second.everything(long)
        assert moved_end(await second.get(long, places)) == here
        second.check(places, here)
        requests = second.manager.statistics().stores["remote"].requests
        assert requests.missing == AGAIN_MAX


@pytest.mark.parametrize("missing", [1, 2, 4])
async def test_who_waits_for_a_fetch_that_fails_loads_what_there_is(
    tmp_path: Path, missing: int
) -> None:
    """Loads that join each other's fetches bring, like a single one, what is not missing."""
    long, here = np.arange(5000, 5040), 16
    expected = max(here, len(long) - missing * 2 * PER_BLOCK)
    async with misled(tmp_path, long, here, missing) as second:
        places = second.everything(long)
        fetches = [second.manager.prefetch(long) for _ in range(4)]
        *fetched, got = await asyncio.gather(*fetches, second.get(long, places))
        assert [moved_end(each) for each in fetched] == [expected] * 4
        assert moved_end(got) == expected
        second.check(places, expected)


async def test_nothing_is_hit_while_leaves_are_not_listed(tmp_path: Path) -> None:
    """A chain without leaves in the store is of no use, and not fetched; leaves may come later."""
    async with (
        engine(tmp_path, remote_list_per_s=1000.0) as first,
        engine(tmp_path, remote_list_per_s=1000.0) as second,
    ):
        await first.put(PROMPT, (0,))
        await first.manager.flush()
        await until_known(second, BLOCKS)
        places = second.everything(PROMPT)
        assert moved_end(await second.get(PROMPT, places)) == 0
        assert "remote→host" not in second.manager.statistics().routes
        await first.put(PROMPT)
        await first.manager.flush()
        await until_known(second, 3 * BLOCKS + BLOCKS // 2)
        second.stored = first.stored
        assert moved_end(await second.get(PROMPT, places)) == END
        second.check(places, END)


async def until_known(rig: GroupRig, spans: int) -> None:
    """Wait until an engine knows of so many spans."""
    async with asyncio.timeout(30):
        while rig.manager.statistics().stores["remote"].known_spans != spans:  # noqa: ASYNC110
            await asyncio.sleep(0.01)


@pytest.mark.parametrize("groups", [(0,), (0, WINDOW, CHUNK), tuple(GROUPS)])
async def test_reused_leaves_are_written_with_their_chain(
    tmp_path: Path, groups: tuple[int, ...]
) -> None:
    """With `remote_write: reused`, the blocks of a prefix that a load has found are written."""
    async with engine(tmp_path, remote_write="reused") as first:
        await first.put(PROMPT, groups)
        await first.manager.flush()
        assert "host→remote" not in first.manager.statistics().routes
        places = first.everything(PROMPT)
        end = moved_end(await first.get(PROMPT, places))
        assert end == (END if STATE in groups else 0)
        await first.manager.flush()
        routes = first.manager.statistics().routes
        written = routes["host→remote"].blocks if "host→remote" in routes else 0
        assert written == (sum(map(len, needed(END).values())) if end else 0)


async def test_the_commands_know_leaves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`flexkv remote verify` proves leaves of groups whose blocks are equally large, and finds a
    wrong one."""
    async with pair(tmp_path) as (first, _):
        (path,) = objects(first, tmp_path, {STATE: [BLOCKS - 1]})
    monkeypatch.setenv("FLEXKV_ENABLE_REMOTE", "1")
    monkeypatch.setenv("FLEXKV_REMOTE_CACHE_PATH", f"file://{tmp_path}/shared")
    verify = ["remote", "verify", "--json"]
    told = await asyncio.to_thread(CliRunner().invoke, commands, verify)
    assert told.exit_code == 0, told.output
    lose(path, "flipped")
    assert (await asyncio.to_thread(CliRunner().invoke, commands, verify)).exit_code == 1
