"""Which parts of transfers the remote port has under way, and how it ends those that hang."""

from __future__ import annotations

import asyncio
from asyncio import Future
from collections.abc import AsyncIterator, Sequence
from typing import Any

import pytest

from flexkv.common.errors import MissingBlockError, RemoteError
from flexkv.io.memory.copier import Copier
from flexkv.io.memory.host_blocks import HostBlocks
from flexkv.io.remote.landing import BodyLanding, Landing
from flexkv.io.remote.open import open_store
from flexkv.io.remote.options import RemoteOptions
from flexkv.io.remote.requests import Requests
from tests.remote_rigs import POOL, SPAN_BLOCKS, PortRig, rig_over, span_key

G = SPAN_BLOCKS
OPTIONS = RemoteOptions(deadline_s=30.0, gets_max=2, puts_max=2, retries=0)


class Gate:
    """A store in memory whose requests wait until a test lets them go.

    Attributes:
        is_open: whether requests go at once.
        waiting: (kind, span, what lets it go) of each request, in the order in which they came.
    """

    kind, where = "memory", "gate"

    def __init__(self) -> None:
        self.is_open = True
        self.changed = asyncio.Event()
        self.waiting: list[tuple[str, int, Future[None]]] = []
        self._store: Any = open_store("memory://", {}, OPTIONS)
        self._spans = {POOL.object_name(span_key(span)): span for span in range(5)}
        self._tasks: set[asyncio.Task[None]] = set()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    def landing(self, requests: Requests, host: HostBlocks, copier: Copier) -> Landing:
        """Return what brings spans from here."""
        return BodyLanding(self, requests, host, copier)

    async def _pass(self, kind: str, name: str) -> None:
        if not self.is_open:
            gate: Future[None] = asyncio.get_running_loop().create_future()
            self.waiting.append((kind, self._spans[name], gate))
            self.changed.set()
            gate.add_done_callback(lambda _: self.changed.set())
            await gate

    async def put(self, name: str, buffers: Sequence[Any]) -> bool:
        """Create an object once the test allows it."""
        await self._pass("put", name)
        return await self._store.put(name, buffers)  # type: ignore[no-any-return]

    def get(self, name: str, first: int, last: int) -> Future[Any]:
        """Begin to read once the test allows it."""

        async def get() -> Any:
            await self._pass("get", name)
            return await self._store.get(name, first, last)

        return asyncio.get_running_loop().create_task(get())

    def under_way(self) -> list[tuple[str, int]]:
        """Return the kinds and spans of the requests that wait."""
        return [(kind, span) for kind, span, gate in self.waiting if not gate.done()]

    def let_go(self, kind: str, span: int) -> None:
        """Let a request go."""
        next(
            gate for its, at, gate in self.waiting if (its, at) == (kind, span) and not gate.done()
        ).set_result(None)


@pytest.fixture
async def gate() -> AsyncIterator[tuple[Gate, PortRig]]:
    """Yield a gate that is shut, with four spans behind it, and a port."""
    store = Gate()
    async with rig_over(store, OPTIONS) as rig:
        await rig.store_spans(0, 1, 2, 3)
        store.is_open = False
        yield store, rig
        store.is_open = True


async def settled(store: Gate, wanted: list[tuple[str, int]]) -> None:
    """Wait until these requests are under way, and check that no others are after some turns."""
    async with asyncio.timeout(20):
        while sorted(store.under_way()) != sorted(wanted):
            store.changed.clear()
            await store.changed.wait()
    for _ in range(20):
        await asyncio.sleep(0)
    assert sorted(store.under_way()) == sorted(wanted)


async def end_of_a_put(rig: PortRig) -> None:
    """Wait until a put that is under way has ended, and others may have begun."""
    puts = [task for task in rig.tasks if task.get_name() == "remote put" and not task.done()]
    await asyncio.wait(puts, return_when=asyncio.FIRST_COMPLETED)


async def test_gets_are_bounded_and_in_order(gate: tuple[Gate, PortRig]) -> None:
    """At most `gets_max` spans are asked for at once, in the order of their transfers."""
    store, rig = gate
    ending = asyncio.ensure_future(rig.run(rig.get(1, 3 * G), rig.get(3 * G, 4 * G, at=4 * G)))
    await settled(store, [("get", 0), ("get", 1)])
    store.let_go("get", 1)
    await settled(store, [("get", 0), ("get", 2)])
    store.let_go("get", 0)
    await settled(store, [("get", 2), ("get", 3)])
    store.let_go("get", 2)
    store.let_go("get", 3)
    assert [end.error for end in await ending] == [None, None]


async def test_puts_wait_while_gets_wait(gate: tuple[Gate, PortRig]) -> None:
    """While gets wait for their turn one put at a time goes on; else `puts_max` do."""
    store, rig = gate
    puts = [rig.put(4, at=10 * number) for number in range(3)]
    ending = asyncio.ensure_future(rig.run(*puts, rig.get(0, 4 * G, at=0)))
    await settled(store, [("put", 4), ("put", 4), ("get", 0), ("get", 1)])
    for puts_begun in (2, 3):
        store.let_go("put", 4)
        await end_of_a_put(rig)
        await settled(store, [("put", 4), ("get", 0), ("get", 1)])
        assert len([kind for kind, _, _ in store.waiting if kind == "put"]) == puts_begun
    for span in range(4):
        await settled(store, [("put", 4), *(("get", at) for at in range(span, min(span + 2, 4)))])
        store.let_go("get", span)
    store.let_go("put", 4)
    assert [end.error for end in await ending] == [None] * 4


async def test_nothing_is_asked_for_behind_a_gap(gate: tuple[Gate, PortRig]) -> None:
    """If a span is missing, those behind it are given up, whether they were asked for or not."""
    store, rig = gate
    await store.delete(POOL.object_name(span_key(1)))
    ending = asyncio.ensure_future(rig.run(rig.get(0, 4 * G)))
    await settled(store, [("get", 0), ("get", 1)])
    store.let_go("get", 0)
    await settled(store, [("get", 1), ("get", 2)])
    store.let_go("get", 1)
    (end,) = await ending
    assert (type(end.error), end.filled) == (MissingBlockError, G)
    assert [span for _, span, _ in store.waiting] == [0, 1, 2]
    assert rig.requests.counts().failures == {}, "nothing has failed"


async def test_what_is_before_a_gap_still_comes(gate: tuple[Gate, PortRig]) -> None:
    """A span that is missing does not end the gets of those before it."""
    store, rig = gate
    await store.delete(POOL.object_name(span_key(1)))
    ending = asyncio.ensure_future(rig.run(rig.get(0, 4 * G)))
    await settled(store, [("get", 0), ("get", 1)])
    store.let_go("get", 1)
    await settled(store, [("get", 0)])
    store.let_go("get", 0)
    (end,) = await ending
    assert (type(end.error), end.filled) == (MissingBlockError, G)
    assert all(rig.right(0, G))


async def test_all_ends_at_the_deadline_if_the_store_hangs() -> None:
    """Transfers that were asked for, and those that wait for their turn, end with RemoteError."""
    store = Gate()
    hurried = RemoteOptions(deadline_s=0.05, gets_max=2, puts_max=1)
    async with rig_over(store, hurried) as rig:
        store.is_open = False
        ends = await rig.run(
            rig.get(0, 4 * G), rig.get(0, G, at=4 * G), rig.put(4, at=30), rig.put(3, at=20)
        )
        assert [type(end.error) for end in ends] == [RemoteError] * 4
        assert [end.filled for end in ends] == [0] * 4
        assert not rig.arena.array.any()
        assert rig.port.reap() == []
