"""The generation of a node's blocks: what is shared, kept and forgotten, whatever the store loses.

The model has a few nodes with or without SSD, and the real code that decides. A block is the number
of the event in which it was put, so that it is known whether it is older than a clear.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Coroutine
from copy import deepcopy
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Any, cast

import pytest

from flexkv.cluster.generations import RANDOM_BITS, Generations, Heard, Noted, later_than
from flexkv.cluster.plane import MetadataPlane
from flexkv.cluster.records import STREAMS
from flexkv.cluster.redis_store import RedisStore
from flexkv.cluster.store import BEGIN
from flexkv.common.errors import ClosedError
from flexkv.testing.fake_redis import FakeRedis, FakeRedisServer
from flexkv.testing.virtual_time import run_virtual
from flexkv.tiers.generation import NOTE, Generation
from flexkv.tiers.generation_changes import GenerationChanges, NodeActions
from flexkv.tiers.ssd_note import SsdNote

ALL = (BEGIN,) * STREAMS
SEEDS = int(os.environ.get("GENERATION_SEEDS", "100"))


@dataclass
class Node:
    """A run of a node's engine.

    Attributes:
        folder: of its SSD; None if it has none.
        blocks: what it has.
        cleared: the event in which this node, or one that it might be, was cleared alone.
        own: what it had put itself before it joined.
    """

    folder: Path | None
    blocks: set[int] = field(default_factory=set)
    cleared: int = 0
    own: set[int] = field(default_factory=set)
    is_cut_off: bool = False

    def __post_init__(self) -> None:
        generation = self.generation = Generation([] if self.folder is None else [self.folder])
        generation.has_restored, self.noted = bool(self.blocks), generation.noted
        self.generations = Generations()
        follower = SimpleNamespace(generations=self.generations, resync=lambda: None)
        registration = SimpleNamespace(look_soon=lambda: None)
        plane = cast(MetadataPlane, SimpleNamespace(follower=follower, registration=registration))
        nothing = lambda: None  # noqa: E731 -- an action
        actions = NodeActions(self._clear, cast(Any, nothing), nothing, nothing, nothing)
        GenerationChanges(generation, plane, None, actions)

    def _clear(self) -> None:
        self.blocks.clear()
        self.cleared = 0

    def note(self) -> None:
        """Note the generation, as its task does."""
        noted = self.generation.to_note[1]
        if noted != self.noted:
            self.generation.note(noted)
            self.noted = noted


class Model:
    """A cluster to which things happen.

    Attributes:
        seed: of what happens.
        born: in which event each generation was begun.
        told: in which event a node was cleared alone, by the name of its generation.
    """

    def __init__(self, seed: int, path: Path) -> None:
        self.seed, self.random, self.path = seed, Random(seed), path
        self.server = FakeRedisServer()
        self.store = RedisStore(FakeRedis(self.server), "pool", 60.0)
        self.event, self._folders = 0, count()
        self.born, self.told = {0: 0}, dict[int, int]()
        self.saved: dict[str, Any] | None = None
        self.nodes = [self.start(with_ssd=number != 0) for number in range(3)]

    def start(self, with_ssd: bool) -> Node:
        """Start a new node."""
        folder = self.path / str(next(self._folders)) if with_ssd else None
        if folder is not None:
            folder.mkdir()
        return Node(folder)

    async def heard(self) -> Heard:
        """Return what the store says."""
        heard = (await self.store.read(ALL, 0.0)).heard
        self.born.setdefault(heard.now, self.event)
        return heard

    async def poll(self, node: Node) -> None:
        """Let a node hear from the store, and mend it."""
        if node.is_cut_off:
            return
        heard, was_known = await self.heard(), node.generations.is_known
        node.generations.take(heard)
        is_new = node.generations.is_known and not was_known
        if is_new and heard.closed == heard.name and node.generation.noted.name != heard.name:
            node.cleared, node.own = self.told[heard.name], set(node.blocks)
        node.note()
        await node.generations.mend(self.store, node.generation.is_apart)
        heard = await self.heard()
        if node.generation.is_apart and heard.closed == node.generations.name:
            self.told[heard.closed] = max(node.cleared, self.told.get(heard.closed, 0))

    # -- events ---------------------------------------------------------------------------------

    async def happens(self) -> None:
        """Let something happen, and check the law of nodes that were cleared alone."""
        self.event += 1
        events = [
            self._put, self._put, self._fetch, self._fetch, self._poll, self._poll, self._poll,
            self._reset, self._clear_alone, self._store_is_emptied, self._store_is_set_back,
            self._is_saved, self._restart, self._replace, self._cut,
        ]  # fmt: skip
        await self.random.choice(events)(self.random.choice(self.nodes))
        for node in self.nodes:
            old = {block for block in node.blocks if block < node.cleared}
            assert old <= node.own, f"seed {self.seed}: older than its clear"

    async def _put(self, node: Node) -> None:
        node.blocks.add(self.event)

    async def _fetch(self, node: Node) -> None:
        other = self.random.choice(self.nodes)
        share = node.generation.is_sharing and other.generation.is_sharing
        if share and node.generation.shared == other.generation.shared:
            node.blocks |= other.blocks

    async def _poll(self, node: Node) -> None:
        await self.poll(node)

    async def _reset(self, node: Node) -> None:
        if not node.is_cut_off:
            await self.store.advance(node.generations.number)
            await self.heard()

    async def _clear_alone(self, node: Node) -> None:
        node.blocks.clear()
        node.cleared = self.event
        node.generation.clear(None)
        node.note()
        await self.poll(node)

    async def _store_is_emptied(self, _: Node) -> None:
        self.server.flush()
        self.saved = None  # it belongs to another life of the store

    async def _is_saved(self, _: Node) -> None:
        self.saved = deepcopy(self.server._values)

    async def _store_is_set_back(self, _: Node) -> None:
        if self.saved:
            self.server._values = deepcopy(self.saved)

    async def _restart(self, node: Node) -> None:
        if node.folder is not None:  # without an SSD it is a new node
            again = Node(node.folder, set(node.blocks), node.cleared, node.own)
            self.nodes[self.nodes.index(node)] = again

    async def _replace(self, node: Node) -> None:
        self.nodes[self.nodes.index(node)] = self.start(node.folder is not None)

    async def _cut(self, node: Node) -> None:
        node.is_cut_off = not node.is_cut_off

    async def check(self) -> None:
        """Check that all nodes agree, and have nothing of before a reset that anybody knew of."""
        known = [each.generations.number for each in self.nodes] + [(await self.heard()).now]
        latest = max(self.born[number] for number in known)
        for node in self.nodes:
            node.is_cut_off = False
        for _ in range(8):
            for node in self.nodes:
                await self.poll(node)
        assert len({node.generations.number for node in self.nodes}) == 1
        assert len({node.generations.name for node in self.nodes}) == 1
        for node in self.nodes:
            assert node.generations.is_settled
            assert all(block >= latest for block in node.blocks), f"seed {self.seed}"


@pytest.mark.parametrize("first", range(0, SEEDS, 50))
def test_nothing_of_before_a_clear_comes_back(
    first: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the store forgets and whoever starts again, older blocks are neither kept nor got.

    After a reset that any node or the store remembers, all have only younger blocks. After a node
    was cleared alone, neither it nor whoever starts later gets older ones.
    """

    async def main() -> None:
        for seed in range(first, first + 50):
            model = Model(seed, tmp_path / str(seed))
            for _ in range(60):
                await model.happens()
            await model.check()

    monkeypatch.setattr(os, "fsync", lambda _: None)
    for seed in range(first, first + 50):
        (tmp_path / str(seed)).mkdir()
    run_virtual(main())


def scene(play: Callable[[Model], Coroutine[Any, Any, None]]) -> Callable[[Path], None]:
    """Return a test that plays a scene with the nodes of a model, of which the first has no SSD."""

    def run(tmp_path: Path) -> None:
        async def main() -> None:
            model = Model(0, tmp_path)
            for _ in range(2):
                for node in model.nodes:
                    await model.poll(node)
            await play(model)

        run_virtual(main())

    run.__doc__ = play.__doc__
    return run


@scene
async def test_a_node_with_an_ssd_stays_apart_when_it_is_started_again(model: Model) -> None:
    """The node keeps what it has put since the clear; the others go on sharing."""
    _, cleared, member = model.nodes
    for node in (cleared, member):
        node.blocks.add(1)
    cleared.generation.clear(None)
    cleared.blocks = {2}
    cleared.note()
    await model.poll(cleared)
    again = [Node(node.folder, set(node.blocks)) for node in (cleared, member)]
    for node in again:
        await model.poll(node)
    assert [node.generation.is_sharing for node in again] == [False, True]
    assert [node.blocks for node in again] == [{2}, {1}]
    await model.store.advance(0)
    for node in again:
        await model.poll(node)
    assert [node.generation.is_sharing for node in again] == [True, True]
    assert [node.blocks for node in again] == [set(), set()]


@scene
async def test_who_starts_after_a_lone_clear_is_apart(model: Model) -> None:
    """A new node may be the one that was cleared, so it shares only after a reset."""
    first, second, _ = model.nodes
    first.generation.clear(None)
    await model.poll(first)
    fresh = model.start(with_ssd=True)
    await model.poll(fresh)
    assert not fresh.generation.is_sharing
    await model.store.advance(0)
    for node in (fresh, second):
        await model.poll(node)
    assert fresh.generation.is_sharing
    assert fresh.generation.shared == second.generation.shared


@scene
async def test_a_store_that_has_lost_everything_confirms_no_note(model: Model) -> None:
    """An older note is not confirmed: nobody who runs knows if there was a reset since."""
    for resets in range(2):
        for _ in range(resets):
            await model.store.advance(0)
        away = model.start(with_ssd=True)
        for _ in range(2):
            await model.poll(away)
        away.blocks = {1}
        away.note()
        model.server.flush()
        for _ in range(resets):  # as many as before
            await model.store.advance(0)
        back = Node(away.folder, set(away.blocks))
        for _ in range(3):
            await model.poll(back)
        assert (back.blocks, back.generation.is_sharing) == (set(), True)
        model.server.flush()
        back.blocks = {2}
        await model.poll(back)  # it runs, so it knows better
        await model.poll(back)
        assert (back.blocks, back.generation.is_sharing) == ({2}, True)
        again = Node(back.folder, set(back.blocks))
        await model.poll(again)
        assert again.blocks == {2}


X, Y = 5 << RANDOM_BITS | 111, 5 << RANDOM_BITS | 222


@pytest.mark.parametrize(
    ("own", "heard", "expected"),
    [
        ((X, 1), Heard(X, 1, 1), "agreed"),
        ((X, 1), Heard(X, 0, 2), "agreed"),
        ((X, 1), Heard(), "lost"),
        ((X, 1), Heard(0, 0, 2), "lost"),
        ((X, 1), Heard(Y, 1, 1), "reset"),
        ((0, 1), Heard(X, 0, 2), "reset"),
        ((Y, 1), Heard(X, 1, 1), "doubted"),
        ((Y, 1), Heard(X, 1, 2), "reset"),
        ((Y, 1), Heard(X, 0, 2), "doubted"),
        ((X, 1), Heard(Y, 0, 2), "doubted"),
        ((0, 1), Heard(0, 0, 2), "renamed"),
    ],
)
def test_what_a_node_and_the_store_agree_on(
    own: tuple[int, int], heard: Heard, expected: str
) -> None:
    """The table of the theory of operation, line by line."""
    seen: list[str] = []
    generations = Generations(number=own[0], book=own[1])
    generations.on_reset = lambda number: seen.append("reset")
    generations.on_renamed = lambda: seen.append("renamed")
    generations.take(heard)
    if generations.lost is not None:
        seen.append("lost")
    if generations.doubted is not None:
        assert generations.doubted == Y
        seen.append("doubted")
    assert (seen or ["agreed"]) == [expected]
    assert generations.has_no_book is (not heard.book)
    assert generations.book == (own[1] if {expected} & {"lost", "doubted"} else heard.book)


def test_generations_never_repeat() -> None:
    """Two that follow the same one differ, and both are later."""
    some = {later_than(X) for _ in range(10)}
    assert len(some) == 10
    assert {each >> RANDOM_BITS for each in some} == {6}


def test_nodes_that_are_apart_share_nothing_with_each_other(tmp_path: Path) -> None:
    """Each was cleared alone: the generations of both differ, and from those of all others."""
    first, second = Generation([tmp_path]), Generation([])
    assert first.shared != second.shared, "nothing was heard yet"
    apart = []
    for node in (first, second, first):
        node.adopt(7, 7)
        assert node.shared == 7
        node.clear(None)
        apart.append(node.shared)
    assert len({*apart, 7}) == 4
    assert max(apart) < 1 << 63, "it fits in a message"
    first.adopt(8, 8)
    assert (first.shared, first.is_apart) == (8, False)


def test_a_clear_while_the_engine_closes_waits_for_no_note(tmp_path: Path) -> None:
    """What changes once nothing is noted any more is told to be lost, and nobody waits for it."""

    async def work() -> None:
        generation = Generation([tmp_path])
        generation.adopt(5, 5)
        generation.stop()
        generation.clear(None)
        with pytest.raises(ClosedError):
            await asyncio.wait_for(generation.written(), 1)

    run_virtual(work())


def test_notes_are_believed_if_all_directories_have_the_same(tmp_path: Path) -> None:
    """A directory that lacks the note, or has another one, or a torn one, may have older blocks."""
    folders = [tmp_path / "a", tmp_path / "b"]
    for folder in folders:
        folder.mkdir()
    generation = Generation(folders)
    generation.adopt(X, X)
    assert generation.note(generation.to_note[1]) is None
    assert Generation(folders).noted == Noted(X, False)
    generation.part()
    assert generation.note(generation.to_note[1]) is None
    assert Generation(folders).noted == Noted(X, True)
    for text in ("", f"{Y} apart\n", "x apart"):
        (folders[1] / NOTE).write_text(text)
        assert Generation(folders).noted == Noted()
    SsdNote(folders, NOTE).forget()
    assert [list(folder.iterdir()) for folder in folders] == [[], []]
    SsdNote(folders, NOTE).forget()
