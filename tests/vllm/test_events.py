"""Tests of the KV events of a real engine, as a router receives them over ZMQ."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from msgspec.msgpack import Decoder

zmq = pytest.importorskip("zmq")
kv_events = pytest.importorskip("vllm.distributed.kv_events")


class Router:
    """A router that knows from events which block of an engine is in which medium."""

    def __init__(self) -> None:
        self._socket = zmq.Context.instance().socket(zmq.SUB)
        self._socket.setsockopt(zmq.SUBSCRIBE, b"")
        self._socket.setsockopt(zmq.RCVHWM, 0)
        self.endpoint = f"tcp://127.0.0.1:{self._socket.bind_to_random_port('tcp://127.0.0.1')}"
        self.there: set[tuple[Any, str]] = set()
        self.parents: dict[Any, Any] = {}
        self.tokens: dict[Any, list[int]] = {}
        self.wrong: list[str] = []
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        decoder = Decoder(kv_events.KVEventBatch)
        while not self._ended.is_set() or self._socket.poll(300):
            if self._socket.poll(100):
                for event in decoder.decode(self._socket.recv_multipart()[2]).events:
                    self._hear(event)

    def _hear(self, event: Any) -> None:
        kind = type(event).__name__
        if kind == "AllBlocksCleared":  # vLLM's own cache was emptied
            self.there = {each for each in self.there if each[1] != "GPU"}
            return
        medium = event.medium
        if kind == "BlockRemoved":
            for name in event.block_hashes:
                if (name, medium) not in self.there:
                    self.wrong.append(f"{medium}: removed, and was not there")
                self.there.discard((name, medium))
            return
        parent, size = event.parent_block_hash, event.block_size
        for number, name in enumerate(event.block_hashes):
            known = {each for each, _ in self.there}
            if parent is not None and parent not in known:
                self.wrong.append(f"{medium}: stored before its parent")
            if medium != "GPU" and (name, medium) in self.there:
                self.wrong.append(f"{medium}: stored twice")
            tokens = list(event.token_ids[number * size : (number + 1) * size])
            if self.tokens.setdefault(name, tokens) != tokens:
                self.wrong.append(f"{medium}: other tokens under one hash")
            self.there.add((name, medium))
            self.parents[name] = parent
            parent = name

    def count(self, medium: str) -> int:
        """Count the blocks in a medium."""
        return sum(where == medium for _, where in list(self.there))

    def end(self) -> None:
        """Process the events that have come, and stop."""
        self._ended.set()
        self._thread.join()
        self._socket.close()


@pytest.fixture
def router() -> Iterator[Router]:
    """Yield a router that listens."""
    made = Router()
    yield made
    made.end()


@pytest.mark.support("feature", "KV events", "served")
@pytest.mark.parametrize("connector", ["shim", "own"])
def test_a_router_knows_what_is_where(
    run: Callable[..., dict[str, Any]], router: Router, connector: str
) -> None:
    """While both tiers overflow, the events give exactly the tiers' blocks, with parents first."""
    told = run(
        connector=connector,
        turns=4,
        events=router.endpoint,
        cache={"num_cpu_blocks": 80, "num_ssd_blocks": 120},
        flush=True,
    )
    router.end()
    assert router.wrong == []
    tiers = told["server"]["statistics"]["tiers"]
    assert router.count("CPU") == tiers["host"]["ready_blocks"] > 40
    assert router.count("STORAGE") == tiers["disk"]["ready_blocks"] > 80
    gpu = {name for name, where in router.there if where == "GPU"}
    ours = {name for name, where in router.there if where != "GPU"}
    assert gpu & ours
    assert all(router.parents[name] is None or router.parents[name] in ours for name in ours)
