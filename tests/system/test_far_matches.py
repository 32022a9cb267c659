"""What a server says about far blocks: apart from those that an engine may load, and only then."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from flexkv.common.config import Settings
from flexkv.common.request import Operation
from flexkv.common.terms import Tier
from flexkv.kvmanager import KVManager
from flexkv.server.client import Client
from flexkv.server.wire import Copied, Copy, Matched
from flexkv.testing.far_server import FarServer

from .caches import MODEL, PER_BLOCK
from .serving import BLOCKS, Instance, Peer, eventually, settings_in

HERE = 3


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    """Return the settings of a server without an SSD tier."""
    made = settings_in(tmp_path, num_ssd_blocks=0, num_cpu_blocks=64)
    return made.model_copy(update={"server_answer_ms": 60_000})  # a slow machine is no fault


@pytest.fixture
def served(settings: Settings) -> Iterator[FarServer]:
    """Yield a server with a far tier, and check that it ends with nothing left."""
    made = FarServer(MODEL, settings)
    yield made
    made.close()


@pytest.fixture
def instance(settings: Settings, served: FarServer) -> Iterator[Instance]:
    """Yield an instance at the server."""
    made = Instance(settings)
    made.begin()
    yield made
    made.close()


def matched(
    client: Client, keys: bytes, hold: bool = False, drop: int = 0, how: str = "apart"
) -> Matched:
    """Return the answer to a match that tells far blocks apart."""
    return client.result(client.ask(keys, hold=hold, drop=drop, **{how: True}))


def test_a_match_says_how_many_blocks_behind_the_local_ones_are_far(
    served: FarServer, instance: Instance
) -> None:
    """Three blocks are here, five far: they are counted apart, and only where that is asked for."""
    client, keys = instance.client, instance.keys(0)
    assert (client.welcome.far_tiers, client.welcome.span_blocks) == (("remote",), 1)
    assert matched(client, keys).far == {}
    assert served.far.looks == [], "an empty catalogue is asked for nothing"
    instance.request(Operation.PUT, 0, range(HERE))
    served.hold(keys)
    found = matched(client, keys)
    assert (found.blocks, found.by_tier, found.far) == (HERE, {"host": HERE}, {"remote": 5})
    assert (found.pending, found.coming, served.far.looks) == (0, 0, [HERE])
    plain = client.match(keys)
    assert (plain.blocks, plain.far, served.far.looks) == (HERE, {}, [HERE])
    assert matched(client, keys[: 16 * (HERE + 1)]).far == {}
    assert served.far.looks == [HERE], "nothing is behind what is here"


def test_a_managers_match_shows_what_is_far(served: FarServer, settings: Settings) -> None:
    """A manager at the server, and the engine itself, report how many tokens more lie far.

    What is here is reported as ever; blocks that are coming from there are pending, not far.
    """
    tokens = np.arange(BLOCKS * PER_BLOCK)
    client = settings.model_copy(update={"server_client_mode": True})
    manager = KVManager(MODEL, settings=client)
    manager.start()
    try:
        requests = served.engine.requests
        intake = lambda: requests.intake(Operation.PREFETCH, tokens).keys  # noqa: E731
        keys = served.call(intake)
        assert manager.match(tokens).far_tokens_by_tier == {}
        served.hold(keys, BLOCKS - 1)
        match = manager.match(tokens)
        assert (match.tokens, match.pending_tokens) == (0, 0)
        assert match.far_tokens_by_tier == {Tier.REMOTE: (BLOCKS - 1) * PER_BLOCK}
        assert repr(match) == f"PrefixMatch(0 tokens; {(BLOCKS - 1) * PER_BLOCK} more in remote)"
        assert served.call(lambda: served.engine.match(tokens)) == match
        served.pass_transfers(0)
        task_id = manager.prefetch_async(tokens)
        eventually(lambda: manager.match(tokens).pending_tokens)
        served.hold(keys)
        match = manager.match(tokens)
        assert (match.tokens, match.pending_tokens) == ((BLOCKS - 1) * PER_BLOCK,) * 2
        assert match.far_tokens_by_tier == {Tier.REMOTE: PER_BLOCK}
        assert served.call(lambda: served.engine.match(tokens)) == match
        served.pass_transfers(None)
        manager.wait(task_id)
    finally:
        manager.shutdown()


def test_what_is_coming_from_far_is_not_offered(served: FarServer, instance: Instance) -> None:
    """Blocks on their way from far may fail to arrive: they count as far until they are here."""
    client, keys = instance.client, instance.keys(0)
    instance.request(Operation.PUT, 0, range(HERE))
    served.hold(keys, 6)
    served.pass_transfers(0)
    number = client.prefetch(keys, HERE)
    eventually(lambda: matched(client, keys).coming)
    served.hold(keys)
    found = matched(client, keys, hold=True)
    assert (found.blocks, found.pending, found.far, found.coming) == (HERE, 0, {"remote": 5}, 3)
    plain = client.match(keys)
    assert (plain.blocks, plain.pending) == (6, 3)
    client.release([found.number])
    served.pass_transfers(None)
    assert instance.end_of(number).moved == 3
    found = matched(client, keys)
    assert (found.blocks, found.far, found.coming) == (6, {"remote": 2}, 0)
    assert found.by_tier == {"host": 6}


def test_blocks_of_the_last_hint_are_told_apart_while_they_come(
    served: FarServer, instance: Instance
) -> None:
    """That the catalogue is empty meanwhile does not make them safe to offer."""
    client, keys = instance.client, instance.keys(0)
    served.hold(keys)
    served.pass_transfers(0)
    number = client.prefetch(keys, 0)
    eventually(lambda: matched(client, keys).coming)
    served.call(served.far.hinted.clear)
    found = matched(client, keys)
    assert (found.blocks, found.far, found.coming) == (0, {"remote": BLOCKS}, BLOCKS)
    served.lose(keys)
    served.pass_transfers(None)
    assert instance.end_of(number).moved == 0
    assert matched(client, keys).far == {}


def test_blocks_that_are_here_behind_coming_ones_are_counted_with_them(
    served: FarServer, instance: Instance
) -> None:
    """They can be had, but not be offered yet: what comes before them may fail to arrive."""
    client, keys = instance.client, instance.keys(0)
    served.hold(keys, 5)
    served.pass_transfers(0)
    number = client.prefetch(keys, 0)
    eventually(lambda: matched(client, keys).coming)
    assert instance.request(Operation.PUT, 0, range(BLOCKS)).moved == 3
    found = matched(client, keys)
    assert (found.blocks, found.by_tier) == (0, {})
    assert found.far == {"remote": 5, "host": 3}
    assert (found.fetched, found.coming) == ({"remote": 5}, 5)
    served.pass_transfers(None)
    assert instance.end_of(number).moved == 5
    assert matched(client, keys).blocks == BLOCKS


def test_a_put_under_way_is_no_far_block(served: FarServer, settings: Settings) -> None:
    """Blocks that come from a device are offered as before, and far ones behind them counted."""
    client, agent = Client(settings, MODEL), Peer(settings, "agent")
    eventually(lambda: (client.poll(), client.is_ready)[1])
    keys = client.keys(list(range(BLOCKS * PER_BLOCK)))
    served.hold(keys)
    client.start(Operation.PUT, keys[: 16 * (HERE + 1)], 0, np.arange(HERE))
    client.flush()
    copy = agent.hear(Copy)
    found = matched(client, keys)
    assert (found.blocks, found.pending) == (HERE, HERE)
    assert (found.far, found.coming) == ({"remote": 5}, 0)
    agent.say(Copied(copy.op_id))
    eventually(client.poll)
    agent.close()
    client.close()


@pytest.mark.parametrize("how", ["apart", "with_far"])
def test_a_dropped_block_is_neither_found_nor_far(
    served: FarServer, instance: Instance, how: str
) -> None:
    """With a block to drop, the hit is one shorter, and what is far begins where it would."""
    client, keys = instance.client, instance.keys(0)
    instance.request(Operation.PUT, 0, range(HERE))
    served.hold(keys)
    found = matched(client, keys, drop=1, how=how)
    assert (found.blocks, found.far, found.fetched) == (HERE - 1, {"remote": 5}, {"remote": 5})
    served.call(served.far.hinted.clear)
    found = matched(client, keys, drop=1, how=how)
    assert (found.blocks, found.far) == (HERE - 1, {})


def test_a_match_holds_nothing_that_is_far(served: FarServer, instance: Instance) -> None:
    """A hold pins the blocks that are here; a fetch of the others takes it over, and ends it."""
    client, keys = instance.client, instance.keys(0)
    instance.request(Operation.PUT, 0, range(HERE))
    served.hold(keys)
    found = matched(client, keys, hold=True)
    eventually(lambda: not served.idle())
    number = client.prefetch(keys, HERE, found.number)
    assert instance.end_of(number).moved == 5
    eventually(served.idle)


def test_a_far_tier_that_is_down_is_not_spoken_of(served: FarServer, instance: Instance) -> None:
    """What cannot be fetched now is not far: nobody should wait for it."""
    client, keys = instance.client, instance.keys(0)
    served.hold(keys)
    assert matched(client, keys).far == {"remote": BLOCKS}
    served.call(lambda: served.engine.scheduler.watch.lose(Tier.REMOTE, "planted"))
    assert matched(client, keys).far == {}
