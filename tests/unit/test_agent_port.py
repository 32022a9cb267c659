"""The port of an agent: which copies are sent within its windows, and which have to wait."""

from __future__ import annotations

import numpy as np
import pytest
from msgspec import structs

from flexkv.common.errors import AgentGoneError
from flexkv.common.terms import Layers, Route, Tier, Transfer
from flexkv.front.layerwise import LayerProgress
from flexkv.server.agent_port import COPIES_MIN, UNREAD_BYTES_MAX, AgentPort
from flexkv.server.fleet import FleetPort
from flexkv.server.wire import Copied, Copy, GetEnded, Message, ProtocolError
from tests.property.fleet_model import ONE_RANK, Wire

TO_DEVICE, TO_HOST = Route(Tier.HOST, Tier.DEVICE), Route(Tier.DEVICE, Tier.HOST)
BLOCK_BYTES = 16


def copy(op_id: int, route: Route, blocks: int = 1) -> Transfer:
    """Return a transfer of the first blocks."""
    ids = np.arange(blocks)
    return Transfer(op_id, 0, route, ids, ids)


class Rig:
    """A port with a window of `window_blocks` blocks, and the copies that its agent has to do."""

    def __init__(self, window_blocks: int) -> None:
        self.wire = Wire()
        self.port = AgentPort(self.wire, [BLOCK_BYTES], 64, window_blocks * BLOCK_BYTES)

    def submit(self, route: Route, *tokens: int, blocks: int = 1) -> None:
        """Submit a transfer under each op id."""
        for op_id in tokens:
            self.port.submit(copy(op_id, route, blocks))

    def answer(self, *tokens: int) -> None:
        """Let the agent report the end of some copies."""
        for op_id in tokens:
            del self.wire.asked[op_id]
            self.port.copied(Copied(op_id))

    @property
    def asked(self) -> list[int]:
        """Return the op ids of the copies that the agent has yet to answer."""
        return list(self.wire.asked)


def test_no_more_is_sent_than_the_window_has_room_for() -> None:
    """No more copies are sent than the window holds, even to an agent that does not read."""
    rig = Rig(8)
    rig.submit(TO_HOST, *range(1000))
    assert rig.asked == list(range(8))
    rig.answer(3)
    assert rig.asked == [0, 1, 2, 4, 5, 6, 7, 8]


def test_a_copy_has_its_group_and_the_bytes_of_its_blocks() -> None:
    """The agent is told a copy's group; the window counts what blocks of that group take."""
    wire, ids = Wire(), np.arange(3)
    port = AgentPort(wire, [BLOCK_BYTES, 4 * BLOCK_BYTES], 64, COPIES_MIN * 12 * BLOCK_BYTES)
    for op_id in range(COPIES_MIN + 1):
        port.submit(Transfer(op_id, 0, TO_HOST, ids, ids, group=1))
    assert [copy.group for copy in wire.asked.values()] == [1] * COPIES_MIN
    port.copied(Copied(0))
    assert list(wire.asked) == list(range(COPIES_MIN + 1))


def test_a_few_copies_may_always_be_sent() -> None:
    """COPIES_MIN copies may be sent, however large they are."""
    rig = Rig(1)
    rig.submit(TO_HOST, *range(10), blocks=50)
    assert rig.asked == list(range(COPIES_MIN))


def test_what_goes_to_the_device_goes_first_and_starves_nobody() -> None:
    """While copies to the device wait, one copy at a time still goes to the host."""
    rig = Rig(4)
    rig.submit(TO_HOST, *range(10))
    rig.submit(TO_DEVICE, *range(100, 110))
    assert rig.asked == [0, 1, 2, 3, 100, 101, 102, 103]
    rig.answer(0, 1, 2)
    assert [op_id for op_id in rig.asked if op_id < 100] == [3]
    rig.answer(3)
    assert [op_id for op_id in rig.asked if op_id < 100] == [4]
    rig.answer(*range(100, 104))
    rig.answer(*range(104, 108))
    assert sorted(rig.asked) == [4, 5, 6, 7, 108, 109]


def test_what_was_not_sent_fails_at_once_and_what_was_stays() -> None:
    """Unsent copies fail at once; sent ones stay, as the agent may perform them at any time."""
    rig = Rig(4)
    rig.submit(TO_HOST, *range(10))
    rig.port.fail_unsent("it does not answer")
    ended = rig.port.reap()
    assert [op_id for op_id, *_ in ended] == list(range(4, 10))
    assert all("does not answer" in str(error) for _, error, *_ in ended)
    assert rig.port.is_busy
    rig.answer(0, 1, 2, 3)
    assert [error for _, error, *_ in rig.port.reap()] == [None] * 4
    assert not rig.port.is_busy


def test_everything_ends_with_the_connection() -> None:
    """When the connection ends, each transfer ends once, sent or not."""
    rig = Rig(4)
    rig.submit(TO_HOST, *range(10))
    rig.port.gone()
    ended = rig.port.reap()
    assert sorted(op_id for op_id, *_ in ended) == list(range(10))
    assert all(isinstance(error, AgentGoneError) for _, error, *_ in ended)


def test_an_agent_ends_only_what_it_was_sent() -> None:
    """An agent may end only copies that it was sent, and each of them once."""
    rig = Rig(4)
    rig.submit(TO_HOST, *range(10))
    with pytest.raises(ProtocolError, match="not under way"):
        rig.port.copied(Copied(9))
    rig.answer(0)
    with pytest.raises(ProtocolError, match="not under way"):
        rig.port.copied(Copied(0))


def test_the_oldest_copy_tells_for_how_long_nothing_was_answered(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """`oldest_s` counts from when a copy was sent, not from when it began to wait."""
    now = [100.0]
    monkeypatch.setattr("flexkv.server.agent_port.time.monotonic", lambda: now[0])
    rig = Rig(4)
    assert rig.port.oldest_s() == 0.0
    rig.submit(TO_HOST, *range(5))
    now[0] = 107.0
    assert rig.port.oldest_s() == 7.0
    rig.answer(0)
    assert rig.port.oldest_s() == 7.0
    rig.answer(1, 2, 3)
    assert rig.port.oldest_s() == 0.0


class Told(Wire):
    """A link that also keeps what is no copy, and whose peer may have left much unread."""

    def __init__(self) -> None:
        super().__init__()
        self.told: list[Message] = []
        self.unread_bytes = 0

    def send(self, message: Message) -> None:
        """Keep a message."""
        if isinstance(message, Copy):
            super().send(message)
        else:
            self.told.append(message)

    @property
    def unsent_bytes(self) -> int:
        """Return how much the peer has left unread."""
        return self.unread_bytes


def test_what_goes_layer_by_layer_counts_for_its_layers_only() -> None:
    """A piece of some layers takes its share of the window, and names the whole copy."""
    rig = Rig(8)
    watch = LayerProgress(4, 4)
    for op_id in range(40):
        piece = copy(op_id, TO_DEVICE, blocks=2)
        layers = Layers(op_id % 4, op_id % 4 + 1, 1000 + op_id // 4)
        rig.port.submit(structs.replace(piece, watch=watch, layers=layers))
    assert rig.asked == list(range(16))
    assert rig.wire.asked[6].layers == (1001, 2, 3)
    rig.answer(*range(16))
    assert rig.asked == list(range(16, 32))


def test_an_instance_with_an_agent_that_does_not_read_is_dismissed() -> None:
    """What is told without a window cannot pile up: its whole instance is dismissed, once."""
    model = ONE_RANK.model_copy(update={"tp_size": 2})
    fleet, links = FleetPort(model.spaces(4), 100), [Told() for _ in range(3)]
    for number, link in enumerate(links):
        port = AgentPort(link, [BLOCK_BYTES], 64)
        fleet.join(number // 2, number % 2, port, "kv tokens heads dim")
    fleet.tell(0, GetEnded(1))
    fleet.tell(7, GetEnded(2))
    assert [link.told for link in links] == [[GetEnded(1)], [GetEnded(1)], []]
    links[1].unread_bytes = UNREAD_BYTES_MAX
    fleet.tell(0, GetEnded(3))
    assert all(link.is_open for link in links)
    links[1].unread_bytes += 1
    fleet.tell(0, GetEnded(4))
    assert [link.is_open for link in links] == [False, False, True]
    assert fleet.instances[0].ports[0].is_dismissed
