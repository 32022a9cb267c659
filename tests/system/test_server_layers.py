"""Tests of gets and puts layer by layer over a real server in a process of its own."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from flexkv.common.config import ModelConfig, Settings
from flexkv.common.errors import ConfigError
from flexkv.common.request import Operation
from flexkv.server.agent import Agent
from flexkv.server.launch import LaunchedServer
from flexkv.server.operator import command
from flexkv.server.wire import Copied, Copy, Done, GetEnded, GetPlanned, Message, Ready, Start
from flexkv.testing.agent_process import AgentProcess

from .caches import DEVICE_BLOCKS, PER_BLOCK, bytes_of
from .forked import forked_server
from .serving import Instance, Peer, eventually, settings_in

LAYERS = 20
SOURCES, TARGETS = range(24), range(63, 39, -1)
HEADS, HEAD_SIZE = 4, 64


def model_of(tp_size: int = 1) -> ModelConfig:
    """Return a model with many layers, for which a prompt has more than a MiB."""
    return ModelConfig(
        num_layers=LAYERS, num_kv_heads=HEADS, head_size=HEAD_SIZE, dtype="float16", tp_size=tp_size
    )


class LayeredInstance(Instance):
    """An engine whose requests go layer by layer."""

    @staticmethod
    def _cache_of(model: ModelConfig, seed: int) -> list[NDArray[np.float16]]:
        shape = (2, DEVICE_BLOCKS, PER_BLOCK, HEADS // model.parts, HEAD_SIZE)
        random = np.random.default_rng(seed)
        return [
            random.integers(0, 1 << 16, shape, np.uint16).view(np.float16) for _ in range(LAYERS)
        ]

    def get(self, prompt: int, when_ready: bool = False, device: range = TARGETS) -> int:
        """Begin a get by layer."""
        keys, ids = self.keys(prompt, len(device)), np.array(device)
        number = self.client.get_by_layer(keys, 0, ids, 0, when_ready)
        self.client.flush()
        return number

    def put(self, prompt: int, device: range = SOURCES) -> int:
        """Begin a put by layer."""
        keys, ids = self.keys(prompt, len(device)), np.array(device)
        number = self.client.put(keys, 0, ids, self.client.generation, by_layer=True)
        self.client.flush()
        return number

    def wipe(self, device: range) -> None:
        """Overwrite device blocks of every rank."""
        for layer in [layer for caches in self.caches for layer in caches]:
            layer[:, list(device)] = 0

    def wait_all(self, number: int) -> None:
        """Wait for every layer on every rank, and compare its bytes at once."""
        for layer in range(LAYERS):
            for agent, caches in zip(self.agents, self.caches, strict=True):
                assert agent.wait_for_layer([number], layer)
                found, there = (bytes_of([caches[layer]], at) for at in (TARGETS, SOURCES))
                np.testing.assert_array_equal(found, there)


class Waiter:
    """A thread that waits for a layer of a request."""

    def __init__(self, agent: Agent, number: int, layer: int = 0) -> None:
        self._found: list[bool] = []
        work = lambda: self._found.append(agent.wait_for_layer([number], layer))  # noqa: E731
        self._thread = threading.Thread(target=work)
        self._thread.start()

    def found(self) -> bool:
        """Return what the wait has returned."""
        self._thread.join(15.0)
        (found,) = self._found
        return found


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    """Return settings for two prompts in host memory, and pieces of one layer."""
    return settings_in(tmp_path, num_cpu_blocks=64, device_window_mb=1)


@pytest.fixture(params=[1, 2])
def instance(request: pytest.FixtureRequest, settings: Settings) -> Iterator[LayeredInstance]:
    """Yield an instance of one or two ranks that is connected to a server."""
    server = forked_server(settings, model_of(request.param))
    made = LayeredInstance(settings, model_of(request.param))
    made.begin()
    yield made
    made.close()
    server.close()
    assert server.exit_status == 0


only_one_rank = pytest.mark.parametrize("instance", [1], indirect=True)
only_two_ranks = pytest.mark.parametrize("instance", [2], indirect=True)


@pytest.fixture
def server(settings: Settings) -> Iterator[LaunchedServer]:
    """Yield a server whose instances come from the test."""
    made = forked_server(settings, model_of())
    yield made
    made.close()


def under_way(settings: Settings) -> tuple[int, int]:
    """Return how many runs are under way, and how many host blocks are claimed."""
    statistics = command(settings.server_recv_port, "status")["statistics"]
    return statistics["runs_in_flight"], statistics["claims"]


# -- gets ------------------------------------------------------------------------------------------


def test_a_layer_has_its_bytes_when_it_is_reported(
    instance: LayeredInstance, settings: Settings
) -> None:
    """A layer that an agent reports has its bytes, from host memory and from SSD."""
    assert instance.request(Operation.PUT, 1, SOURCES).moved == len(SOURCES)
    command(settings.server_recv_port, "flush")
    for tiers in ("host", "disk"):
        if tiers == "disk":
            command(settings.server_recv_port, "clear", tier="host")
        instance.wipe(TARGETS)
        number = instance.get(1)
        instance.wait_all(number)
        assert [agent.wait_for_end(number) for agent in instance.agents] == [24] * len(
            instance.agents
        )
        assert instance.end_of(number).moved == len(TARGETS)
        assert instance.agents[0].wait_for_layer([number], LAYERS - 1, 0.0), "it is remembered"
    with pytest.raises(ConfigError, match="layer=20: must be from 0 to 19"):
        instance.agents[0].wait_for_layer([number], LAYERS)


@only_one_rank
def test_a_worker_may_wait_before_the_get_is_known(instance: LayeredInstance) -> None:
    """A wait may begin before its request, and ends by its timeout if the request never comes."""
    assert instance.request(Operation.PUT, 1, SOURCES).moved == len(SOURCES)
    instance.wipe(TARGETS)
    (agent,) = instance.agents
    waiter = Waiter(agent, instance.client._next + 1, LAYERS - 1)
    with pytest.raises(TimeoutError):
        agent.wait_for_layer([instance.client._next + 1], 0, 0.01)
    number = instance.get(1, when_ready=True)
    with pytest.raises(TimeoutError):
        agent.wait_for_end(number, 0.01)
    agent.ready([number], to_device=True)
    assert waiter.found()
    np.testing.assert_array_equal(instance.content(TARGETS), instance.content(SOURCES))


@only_one_rank
def test_gets_that_end_without_a_layer_say_so(instance: LayeredInstance) -> None:
    """A get that finds nothing, is refused or is cancelled ends every wait; others are awaited."""
    assert instance.request(Operation.PUT, 1, SOURCES).moved == len(SOURCES)
    (agent,) = instance.agents
    missing = instance.get(2)
    assert not agent.wait_for_layer([missing], 0)
    assert (agent.wait_for_end(missing), instance.end_of(missing).status) == (0, "notfound")
    refused = instance.get(1, device=range(DEVICE_BLOCKS - 1, DEVICE_BLOCKS + 23))
    assert not agent.wait_for_layer([refused], 0)
    assert "is not a device block" in instance.end_of(refused).error
    cancelled = instance.get(1, when_ready=True)
    waiter = Waiter(agent, cancelled)
    instance.client.cancel([cancelled])
    assert instance.end_of(cancelled).status == "cancelled"
    assert not waiter.found()
    instance.wipe(TARGETS)
    good = instance.get(1)
    assert not agent.wait_for_layer([missing, good], LAYERS - 1)
    np.testing.assert_array_equal(instance.content(TARGETS), instance.content(SOURCES))


@only_one_rank
def test_a_part_of_a_prompt_comes_layer_by_layer(instance: LayeredInstance) -> None:
    """A get that asks for more than is resident loads the resident blocks by layer."""
    assert instance.request(Operation.PUT, 1, range(10)).moved == 10
    instance.wipe(TARGETS)
    number, (agent,) = instance.get(1), instance.agents
    for layer in range(LAYERS):
        assert agent.wait_for_layer([number], layer)
        assert bytes_of([instance.caches[0][layer]], TARGETS[:10]).any()
    assert agent.wait_for_end(number) == 10
    expected = instance.content(range(10))
    np.testing.assert_array_equal(instance.content(TARGETS[:10]), expected)
    assert not np.any(instance.content(TARGETS[10:]))


@only_two_ranks
def test_a_rank_that_reconnects_learns_what_it_has_missed(instance: LayeredInstance) -> None:
    """A get that ended while a rank was away ends a wait that begins when the rank is back."""
    assert instance.request(Operation.PUT, 1, SOURCES).moved == len(SOURCES)
    one, two = instance.agents
    number, before = instance.get(1, when_ready=True), instance.client.epoch
    two.close()
    assert instance.end_of(number).status == "cancelled"
    instance.agents[1] = Agent(
        instance.client._address, model_of(2), settings_of(instance), 0, tp_rank=1
    )
    instance.agents[1].start(instance.caches[1])
    eventually(lambda: (instance.client.poll(), instance.client.epoch > before)[1])
    for agent in (one, instance.agents[1]):
        assert not agent.wait_for_layer([number], 0)
        assert agent.wait_for_end(number) == 0
    assert not two.wait_for_layer([number + 1], 0), "a closed agent knows that none will come"
    instance.wipe(TARGETS)
    instance.wait_all(instance.get(1))


def settings_of(instance: Instance) -> Any:
    """Return the settings of the cache that an instance uses."""
    return instance.agents[0]._cache


def test_a_server_that_is_killed_ends_every_wait(settings: Settings) -> None:
    """When the server is killed, known and unknown gets end; the next server serves new ones."""
    server = forked_server(settings, model_of())
    instance = LayeredInstance(settings, model_of())
    instance.begin()
    assert instance.request(Operation.PUT, 1, SOURCES).moved == len(SOURCES)
    command(settings.server_recv_port, "flush")
    known, (agent,) = instance.get(1, when_ready=True), instance.agents
    waiters = [Waiter(agent, number) for number in (known, known + 1000)]
    os.kill(server.pid, signal.SIGKILL)
    assert [waiter.found() for waiter in waiters] == [False, False]
    assert not agent.wait_for_layer([known + 2000], 0), "no get can begin without a server"
    assert instance.end_of(known).status == "failed"
    server.close()
    server = forked_server(settings, model_of())
    try:
        instance.wait_ready()
        instance.wipe(TARGETS)
        instance.wait_all(instance.get(1))
    finally:
        instance.close()
        server.close()


# -- puts ------------------------------------------------------------------------------------------


def test_a_put_copies_what_every_rank_has_written(instance: LayeredInstance) -> None:
    """A layer is copied only when all ranks have written it; a report covers earlier layers."""
    written = [[layer.copy() for layer in caches] for caches in instance.caches]
    expected = instance.content(SOURCES)
    instance.wipe(SOURCES)
    number, done = instance.client._next + 1, [0, 0]
    reports = list(range(LAYERS)), [3, 5, 11, LAYERS - 1]
    for layer in range(LAYERS):
        for rank, agent in enumerate(instance.agents):
            if layer in reports[rank]:
                for each in range(done[rank], layer + 1):
                    instance.caches[rank][each][:] = written[rank][each]
                done[rank] = layer + 1
                agent.layer_written([number], layer)
                agent.layer_written([number], layer // 2)
        if layer == 1:  # the first reports come before their put
            assert instance.put(1) == number
        if 1 <= layer < LAYERS - 1:
            assert not instance.client.match(instance.keys(1)).blocks
    assert instance.end_of(number).moved == len(SOURCES)
    assert instance.request(Operation.GET, 1, TARGETS).moved == len(TARGETS)
    np.testing.assert_array_equal(instance.content(TARGETS), expected)


@only_one_rank
def test_others_do_not_wait_for_a_put_whose_layers_stop(
    instance: LayeredInstance, settings: Settings
) -> None:
    """A put whose layers stop delays no flush and no other put; cancelled, it leaves nothing."""
    (agent,) = instance.agents
    stopped = instance.put(1)
    agent.layer_written([stopped], 4)
    assert instance.request(Operation.PUT, 2, range(30, 38)).moved == 8
    eventually(lambda: under_way(settings)[0])
    command(settings.server_recv_port, "flush")
    instance.client.cancel([stopped])
    assert instance.end_of(stopped).status == "cancelled"
    assert instance.client.match(instance.keys(1)).blocks == 0
    eventually(lambda: under_way(settings) == (0, 0))


@only_one_rank
def test_a_usual_put_begins_with_the_last_layer(instance: LayeredInstance) -> None:
    """Layers of a put that was not started by layer count only when all are written."""
    ids = np.array(SOURCES)
    number = instance.client.put(instance.keys(1, 24), 0, ids, instance.client.generation)
    instance.client.flush()
    (agent,) = instance.agents
    agent.layer_written([number], LAYERS - 2)
    assert instance.request(Operation.PUT, 2, range(30, 38)).moved == 8
    assert number not in instance.ends
    agent.layer_written([number], LAYERS - 1)
    assert instance.end_of(number).moved == len(SOURCES)


def test_a_put_that_gets_no_more_layers_is_cancelled(tmp_path: Path) -> None:
    """A put that holds host memory and gets no new layer within `io_deadline_s` is cancelled."""
    settings = settings_in(tmp_path, num_cpu_blocks=64, io_deadline_s=0.2)
    server = forked_server(settings, model_of())
    instance = LayeredInstance(settings, model_of())
    try:
        instance.begin()
        stopped, (agent,) = instance.put(1), instance.agents
        agent.layer_written([stopped], 4)
        assert instance.end_of(stopped).status == "cancelled"
        assert under_way(settings) == (0, 0)
        assert instance.request(Operation.PUT, 1, SOURCES).moved == len(SOURCES)
    finally:
        instance.close()
        server.close()


def test_a_put_ends_with_its_agent(settings: Settings, server: LaunchedServer) -> None:
    """If its agent is killed, a put that waits for layers is cancelled, and leaves nothing."""
    instance = LayeredInstance(settings, model_of(), number=1)
    agent = AgentProcess(settings, model_of(), DEVICE_BLOCKS, 1)
    try:
        instance.wait_ready()
        keys, ids = instance.keys(1, len(SOURCES)), np.array(SOURCES)
        number = instance.client._start(Operation.PUT, keys, 0, ids, by_layer=True)
        eventually(lambda: (instance.client.poll(), under_way(settings)[0])[1])
        agent.signal(signal.SIGKILL)
        assert instance.end_of(number).status == "cancelled"
        eventually(lambda: under_way(settings) == (0, 0))
    finally:
        agent.close()
        instance.close()


@only_one_rank
def test_a_put_ends_with_its_client(instance: LayeredInstance, settings: Settings) -> None:
    """If its client goes, a put with some layers stored leaves nothing; gets end for the agent."""
    (agent,) = instance.agents
    agent.layer_written([instance.put(1)], 4)
    waiting = instance.get(2, when_ready=True)
    eventually(lambda: under_way(settings)[0])
    waiter = Waiter(agent, waiting)
    instance.client.close()
    assert not waiter.found()
    eventually(lambda: under_way(settings) == (0, 0))


# -- hostile peers ---------------------------------------------------------------------------------


class Pair:
    """A client and the agent of its only rank, both spoken for by the test."""

    def __init__(self, settings: Settings) -> None:
        self.agent = Peer(settings, "agent", model=model_of())
        self.client = Peer(settings, "client", model=model_of())
        self.client.hear_ready()

    def start(self, number: int, operation: str, **more: Any) -> None:
        """Start a request of four blocks by layer."""
        keys, ids = bytes(range(80)), np.arange(4).tobytes()
        self.client.say(
            Start(number, operation, keys, 0, ids, self.client.epoch, by_layer=True, **more)
        )

    def close(self) -> None:
        """Disconnect."""
        self.agent.close()
        self.client.close()


@pytest.fixture
def pair(settings: Settings, server: LaunchedServer) -> Iterator[Pair]:
    """Yield a client and an agent at a server."""
    made = Pair(settings)
    yield made
    made.close()


def test_an_agent_is_asked_for_the_layers_that_it_has_reported(
    pair: Pair, settings: Settings
) -> None:
    """Only a report of more layers has layers copied; a get's plan and end reach its agent."""
    pair.start(1, "put", when_ready=True)
    for layers, copied in ((1, [(0, 1)]), (3, [(1, 2), (2, 3)]), (2, []), (3, []), (4, [(3, 4)])):
        pair.agent.say(Ready((1, 77, 1 << 62), layers))
        for bounds in copied:
            copy = pair.agent.hear(Copy)
            assert (copy.layers[1:], copy.to_device) == (bounds, False)
            pair.agent.say(Copied(copy.op_id))
    command(settings.server_recv_port, "status")  # so the server rests when it hears of the others
    pair.agent.say(Ready((1,)))
    for layer in range(4, LAYERS):
        copy = pair.agent.hear(Copy)
        assert copy.layers[1:] == (layer, layer + 1)
        pair.agent.say(Copied(copy.op_id))
    assert pair.client.hear(Done).moved == 4
    pair.start(2, "get")
    planned = pair.agent.hear(GetPlanned)
    assert (planned.number, len(planned.op_ids)) == (2, 1)
    heard: list[tuple[int, int]] = []
    while isinstance(copy := pair.agent.hear(Message), Copy):
        assert copy.layers is not None
        assert copy.layers[0] == planned.op_ids[0]
        heard.append(copy.layers[1:])
        pair.agent.say(Copied(copy.op_id, "it cannot" if copy.layers[1] == 7 else ""))
    assert copy == GetEnded(2)
    assert heard == [(layer, layer + 1) for layer in range(len(heard))]
    assert len(heard) > 7
    assert pair.client.hear(Done).status == "failed"


@pytest.mark.parametrize("layers", [LAYERS + 1, 1 << 63])
def test_more_layers_than_there_are_end_the_agents_connection(pair: Pair, layers: int) -> None:
    """An agent that reports more layers than the model has is dismissed, and its puts end."""
    pair.start(1, "put", when_ready=True)
    pair.agent.say(Ready((1,), layers))
    with pytest.raises(Exception, match="closed"):
        pair.agent.hear(Copy)
    pair.agent.close()
    assert pair.client.hear(Done).status == "cancelled"


@pytest.mark.parametrize("layers", [b"\x00", b"\xff", b"\xc3", b"\xcb\x7f\xf8\0\0\0\0\0\0"])
def test_layers_that_are_none_end_the_agents_connection(pair: Pair, layers: bytes) -> None:
    """An agent that reports 0, -1, true or NaN layers is dismissed."""
    pair.agent.say_bytes(b"\x93\xa5ready\x91\x01" + layers)
    with pytest.raises(Exception, match="closed"):
        pair.agent.hear(Copy)


def test_a_prefetch_has_no_layers(pair: Pair) -> None:
    """A prefetch by layer is refused, and the agents are told nothing."""
    keys = bytes(range(80))
    pair.client.say(Start(1, "prefetch", keys, 0, b"", pair.client.epoch, by_layer=True))
    assert "by_layer=True: must be false for a prefetch" in pair.client.hear(Done).error
    pair.start(2, "get")
    assert pair.agent.hear(GetPlanned).number == 2
    assert pair.agent.hear(GetEnded).number == 2
