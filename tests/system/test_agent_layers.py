"""Tests of a real agent whose server is spoken for by the test, layer by layer."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest

from flexkv.common.config import Settings
from flexkv.server.agent import Agent
from flexkv.server.wire import Copied, Copy, DeviceReady, GetEnded, GetPlanned, Ready
from flexkv.testing.fake_cuda import FakeCuda, FakeTensor

from .conftest import MODEL, kv_caches
from .fake_server import HOST_BLOCKS, STRIDE_BYTES, FakeServer
from .serving import eventually, settings_in

LAYERS, BLOCKS, OPS = MODEL.num_layers, 4, (70, 71)
LAYER_BYTES = MODEL.spaces(4)[0].block_bytes // LAYERS


class Rig:
    """An agent, and the server's end of its connection."""

    def __init__(self, settings: Settings, server: FakeServer, lend: Callable[[Any], Any]) -> None:
        self.server, self.caches = server, kv_caches(1)
        self.host = np.frombuffer(server._arena.buffer, np.uint8).reshape(-1, STRIDE_BYTES)
        self.host[:] = np.random.default_rng(2).integers(0, 256, self.host.shape, np.uint8)
        self.agent = Agent(settings.server_recv_port, MODEL, settings.cache_config)
        self.agent.start(lend(self.caches))
        self.peer = self.lent()
        self.next_op = 100

    def lent(self) -> socket.socket:
        """Return the agent's next connection, once it has lent its device."""
        self.peer = self.server.next_peer()
        assert isinstance(self.server.hear(self.peer), DeviceReady)
        return self.peer

    def say(self, *messages: Any) -> None:
        """Send messages to the agent."""
        for message in messages:
            self.server.say(self.peer, message)

    def piece(self, whole: int, first: int, last: int) -> Copy:
        """Return the copy of some layers of a get: of blocks 0 to 3, or of the next four."""
        self.next_op += 1
        ids = np.arange(BLOCKS) + BLOCKS * (whole % 2)
        return Copy(self.next_op, True, ids.tobytes(), ids.tobytes(), layers=(whole, first, last))

    def ask(self, *copies: Copy) -> None:
        """Have copies made, and hear their ends."""
        self.say(*copies)
        ends = {self.server.hear(self.peer).op_id for _ in copies}
        assert ends == {copy.op_id for copy in copies}

    def there(self, layer: int) -> bool:
        """Return whether a layer of every block has the bytes of host memory."""
        device = self.caches[layer][:, : BLOCKS * len(OPS)].view(np.uint8)
        at = slice(layer * LAYER_BYTES, (layer + 1) * LAYER_BYTES)
        expected = self.host[: BLOCKS * len(OPS), at].reshape(BLOCKS * len(OPS), 2, -1)
        found = device.swapaxes(0, 1).reshape(expected.shape)
        return bool(np.array_equal(found, expected))


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    """Return settings of an agent on a CPU."""
    return settings_in(tmp_path, num_cpu_blocks=HOST_BLOCKS)


@pytest.fixture
def rig(settings: Settings, server: FakeServer) -> Iterator[Rig]:
    """Yield an agent that is connected."""
    made = Rig(settings, server, lambda caches: caches)
    yield made
    made.agent.close()
    del made.host  # it is the memory of the arena


@pytest.mark.parametrize("seed", range(5))
def test_a_layer_is_reported_when_it_is_there_and_not_before(rig: Rig, seed: int) -> None:
    """Whatever the order of the pieces, a layer that is reported has its bytes."""
    random = Random(seed)
    pieces = [(whole, layer, layer + 1) for whole, layer in product(OPS, range(LAYERS))]
    random.shuffle(pieces)
    rig.say(GetPlanned(5, OPS))
    for count, piece in enumerate(pieces, 1):
        rig.ask(rig.piece(*piece))
        done = {(whole, layer) for whole, layer, _ in pieces[:count]}
        for layer in range(LAYERS):
            if all((whole, each) in done for whole in OPS for each in range(layer + 1)):
                assert rig.agent.wait_for_layer([5], layer, 0.0)
                assert rig.there(layer)
            else:
                with pytest.raises(TimeoutError):
                    rig.agent.wait_for_layer([5], layer, 0.0)
    rig.say(GetEnded(5, 8))
    assert rig.agent.wait_for_end(5) == 8


def test_a_connection_that_ends_ends_every_wait(rig: Rig) -> None:
    """Waits end with True for layers that had arrived, else False; a new connection serves gets."""
    rig.say(GetPlanned(5, OPS), GetPlanned(6, ()), GetPlanned(7, (90,)))
    rig.ask(rig.piece(70, 0, 2), rig.piece(71, 0, 1), rig.piece(90, 0, 3))
    found: dict[tuple[int, int], bool] = {}

    def wait(number: int, layer: int) -> None:
        found[number, layer] = rig.agent.wait_for_layer([number], layer)

    asked = [*product((5, 6, 7, 8), range(LAYERS))]
    threads = [threading.Thread(target=wait, args=each) for each in asked]
    for thread in threads:
        thread.start()
    rig.peer.close()
    for thread in threads:
        thread.join(10.0)
    assert found == {each: each[0] == 7 or each == (5, 0) for each in asked}
    rig.lent()
    rig.say(GetPlanned(9, (70, 71)))
    rig.ask(rig.piece(70, 0, 3), rig.piece(71, 0, 3))
    assert rig.agent.wait_for_layer([9], 2)
    assert not rig.agent.wait_for_layer([9, 5], 2), "5 has ended for good"
    assert all(rig.there(layer) for layer in range(LAYERS))


def test_a_failed_piece_and_one_of_nothing_known_count_for_nothing(rig: Rig) -> None:
    """A failed piece counts for no layer; pieces of unknown copies are made, for no get."""
    rig.say(GetPlanned(5, (70,)))
    wrong = Copy(1, True, rig.piece(70, 0, 1).host_ids, b"\xff" * 8 * BLOCKS, layers=(70, 0, 1))
    rig.say(wrong)
    assert rig.server.hear(rig.peer).error
    rig.ask(rig.piece(70, 1, 3), rig.piece(11, 0, 3))
    rig.say(GetEnded(5))
    assert not rig.agent.wait_for_layer([5], 0)
    assert rig.agent.wait_for_end(5) == 0
    assert not rig.agent._gets._of_op


@pytest.mark.parametrize(
    "layers", [(70, 0, 4), (70, 2, 2), (70, 3, 1), (70, 3, 4), (70, 0, 1 << 62)]
)
def test_layers_that_no_model_has_end_the_connection(rig: Rig, layers: Any) -> None:
    """An agent disconnects from a server that asks for impossible layers, and connects anew."""
    rig.say(GetPlanned(5, (70,)), Copy(1, True, b"", b"", layers=layers))
    with pytest.raises(Exception, match="closed"):
        rig.server.hear(rig.peer)
    assert not rig.agent.wait_for_layer([5], 0)
    rig.lent()


def test_a_report_of_layers_is_a_message(rig: Rig) -> None:
    """`layer_written` sends how many layers are written, and `ready` that all are."""
    rig.agent.layer_written([3, 4], 1)
    rig.agent.layer_written([], 1)
    rig.agent.ready([3])
    assert [rig.server.hear(rig.peer) for _ in range(2)] == [Ready((3, 4), 2), Ready((3,))]


def test_a_stream_waits_for_a_layer_and_the_thread_does_not(
    settings: Settings, server: FakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Work that is queued behind a stream's wait finds the layer there; the thread goes on."""
    drivers: list[FakeCuda] = []

    def lend(caches: Any) -> list[FakeTensor]:
        def opened(_: int) -> FakeCuda:
            drivers.append(FakeCuda([*caches]))
            return drivers[-1]

        monkeypatch.setattr("flexkv.tiers.backend.BoundDriver", opened)
        return [FakeTensor(layer) for layer in caches]

    choices = {"use_ce_transfer_h2d": True, "use_ce_transfer_d2h": True}
    config = settings.cache_config.model_copy(update=choices)
    rig = Rig(settings.model_copy(update={"cache_config": config}), server, lend)
    (driver,) = drivers
    stream = driver.open_stream(urgent=False)
    driver.takes_s = {"cuMemcpyBatchAsync": 0.02}
    found: list[bool] = []
    try:
        rig.say(GetPlanned(5, OPS))
        with pytest.raises(TimeoutError, match="were not queued within"):
            rig.agent.wait_for_layer([5], 0, 0.01, stream)
        rig.say(*[rig.piece(op, layer, layer + 1) for layer in range(LAYERS) for op in OPS])
        for layer in range(LAYERS):
            assert rig.agent.wait_for_layer([5], layer, 10.0, stream)
            look = lambda layer=layer: found.append(rig.there(layer))  # noqa: E731
            driver._streams[stream].work.put(look)
        eventually(lambda: len(found) == LAYERS)
        assert all(found)
        ends = [rig.server.hear(rig.peer) for _ in range(LAYERS * len(OPS))]
        assert all(isinstance(end, Copied) and not end.error for end in ends)
        rig.say(GetEnded(5, 8))
        assert rig.agent.wait_for_end(5) == 8
        assert rig.agent.wait_for_layer([5], 2, 0.0, stream), "it is there, so nobody waits"
    finally:
        driver.close_stream(stream)
        rig.agent.close()
        del rig.host
    assert driver.left == 0
