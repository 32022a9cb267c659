"""Tests of loads, puts and steps that go wrong, as vLLM and the server see them.

The rig is that of `test_scheduler_side`: a real server, and an agent whose messages come from the
test.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from flexkv.common.config import CacheConfig
from flexkv.common.errors import ClosedError
from flexkv.server.operator import command
from flexkv.server.wire import Copied, Copy, Ready
from tests.system.conftest import MODEL, PER_BLOCK
from tests.system.serving import eventually

pytest.importorskip("vllm")

from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole

from flexkv.integration.vllm import vllm_v1_adapter, worker
from flexkv.integration.vllm.metadata import StepMetadata
from flexkv.integration.vllm.worker import STEPS_BEHIND, WorkerSide

from .test_scheduler_side import TOKENS, Request, Rig, answered, output, stored

LONG = 8 * PER_BLOCK + 1


@pytest.fixture
def rig(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Rig]:
    """Yield a scheduler's side with its server and agent; the parameter changes the cache."""
    made = Rig(tmp_path, **getattr(request, "param", {}))
    yield made
    made.agent.close()
    made.side.close()


def goes_on(name: str, computed: int, tokens: int, blocks: list[int], drafts: int = 0) -> Any:
    """Return a step in which a running request gets more blocks."""
    step = output()
    step.scheduled_cached_reqs = SimpleNamespace(
        req_ids=[name], new_block_ids=[(blocks,)], num_computed_tokens=[computed],
        resumed_req_ids=set(),
    )  # fmt: skip
    step.num_scheduled_tokens = {name: tokens}
    step.scheduled_spec_decode_tokens = {name: [7] * drafts} if drafts else {}
    return step


def put_of(rig: Rig, step: Any) -> Copy:
    """Report a step's put as ready, and return the copy that the server asks for."""
    made = rig.side.build_connector_meta(step)
    assert len(made.puts) == 1
    rig.agent.say(Ready(tuple(made.puts)))
    copy: Copy = rig.agent.hear(Copy)
    assert not copy.to_device
    return copy


def device_blocks(copy: Copy) -> list[int]:
    """Return the device blocks of a copy, in order."""
    return sorted(np.frombuffer(copy.device_ids, np.int64) & 0xFFFF)


def until_puts_end(rig: Rig, name: str) -> Any:
    """Step until a request has no put under way; return the settles and drops of these steps."""
    total = StepMetadata()

    def over() -> bool:
        step = rig.side.build_connector_meta(output())
        total.settle += step.settle
        total.dropped |= step.dropped
        return not rig.side._states[name].transfers.puts

    eventually(over)
    return total


def load(rig: Rig, request: Request, blocks: list[int]) -> None:
    """Start a request's load, as vLLM does once it has blocks."""
    extra, later = answered(rig, request)
    assert (extra, later) == (3 * PER_BLOCK, True)
    given = SimpleNamespace(get_block_ids=lambda: (blocks,))
    rig.side.update_state_after_alloc(request, given, extra)
    rig.side.client.flush()


def test_a_load_that_came_short_is_settled_and_claims_nothing_again(rig: Rig) -> None:
    """A load that came short fails its blocks, is settled, and is not offered again."""
    stored(rig)
    request = Request("b")
    load(rig, request, [5, 6, 7, 8])
    copy = rig.agent.hear(Copy)
    assert copy.to_device
    rig.agent.say(Copied(copy.op_id, "the copy was made to fail"))
    step = rig.step_until("received")
    assert (step.received, step.failed_blocks) == ({"b"}, {5, 6, 7})
    assert len(step.settle) == 1
    assert answered(rig, request) == (0, False)
    assert answered(rig, Request("c")) == (3 * PER_BLOCK, True)


def test_a_load_that_came_is_not_settled(rig: Rig) -> None:
    """A complete load has no failed blocks, is not settled, and is not stored again."""
    stored(rig)
    request = Request("b")
    load(rig, request, [5, 6, 7, 8])
    rig.agent.say(Copied(rig.agent.hear(Copy).op_id))
    step = rig.step_until("received")
    assert (step.received, step.failed_blocks, step.settle) == ({"b"}, set(), [])
    made = rig.side.build_connector_meta(output(("b", [5, 6, 7, 8])))
    assert not made.puts


def test_drafts_are_not_stored(rig: Rig) -> None:
    """Blocks with drafts are not stored, since drafts may be rejected."""
    answered(rig, Request("a", num_tokens=LONG))
    copy = put_of(rig, output(("a", [1, 2, 3, 4])))
    assert device_blocks(copy) == [1, 2, 3]
    computed = TOKENS
    step = goes_on("a", computed, 2 * PER_BLOCK, [5, 6], drafts=PER_BLOCK)
    assert device_blocks(put_of(rig, step)) == [4]
    step = goes_on("a", computed + PER_BLOCK, PER_BLOCK, [], drafts=PER_BLOCK)
    assert not rig.side.build_connector_meta(step).puts


def test_a_load_waits_for_puts_that_read_its_blocks(rig: Rig) -> None:
    """A load waits for puts that read its blocks, which it would overwrite."""
    stored(rig)
    copy = rig.begin("x", [10, 11, 12, 13], seed=1000)
    load(rig, Request("b"), [12, 13, 14, 15])
    for _ in range(3):
        rig.side.build_connector_meta(output())
    assert rig.status()["runs_in_flight"] == 1
    rig.agent.say(Copied(copy.op_id))
    waits = rig.side._states["b"].transfers
    eventually(lambda: (rig.side.build_connector_meta(output()), waits.load.number)[1])
    assert rig.agent.hear(Copy).to_device


def test_a_load_does_not_wait_for_puts_of_other_blocks(rig: Rig) -> None:
    """A load does not wait for puts that read other blocks."""
    stored(rig)
    rig.begin("x", [10, 11, 12, 13], seed=1000)
    load(rig, Request("b"), [20, 21, 22, 23])
    assert rig.agent.hear(Copy).to_device


def test_a_put_that_failed_is_made_again_with_the_next_blocks(rig: Rig) -> None:
    """The blocks of a failed put are put again with the next ones, whose parents they are."""
    answered(rig, Request("a", num_tokens=LONG))
    copy = put_of(rig, output(("a", [1, 2, 3, 4])))
    rig.agent.say(Copied(copy.op_id, "the copy was made to fail"))
    assert len(until_puts_end(rig, "a").settle) == 1
    copy = put_of(rig, goes_on("a", TOKENS, PER_BLOCK, [5]))
    assert device_blocks(copy) == [1, 2, 3, 4]
    rig.agent.say(Copied(copy.op_id))
    assert not until_puts_end(rig, "a").settle
    copy = put_of(rig, goes_on("a", TOKENS + PER_BLOCK, PER_BLOCK, [6]))
    assert device_blocks(copy) == [5]
    assert rig.side.take_stats().reduce()["failed_puts"] == 1


@pytest.mark.parametrize(
    "rig", [{"num_cpu_blocks": 8, "enable_ssd": False}], indirect=True, ids=[""]
)
def test_a_put_whose_parents_are_gone_is_made_again_from_the_first_block(rig: Rig) -> None:
    """If a put's parents were evicted meanwhile, the next put has all blocks from the first on."""
    answered(rig, Request("a", num_tokens=LONG))
    rig.agent.say(Copied(put_of(rig, output(("a", [1, 2, 3, 4]))).op_id))
    until_puts_end(rig, "a")
    for number in range(4):
        name = f"other-{number}"
        rig.agent.say(Copied(rig.begin(name, [10, 11, 12, 13], seed=1000 * (1 + number)).op_id))
        until_puts_end(rig, name)
    step = rig.side.build_connector_meta(goes_on("a", TOKENS, PER_BLOCK, [5]))
    rig.agent.say(Ready(tuple(step.puts)))
    until_puts_end(rig, "a")
    copy = put_of(rig, goes_on("a", TOKENS + PER_BLOCK, PER_BLOCK, [6]))
    assert device_blocks(copy) == [1, 2, 3, 4, 5]
    rig.agent.say(Copied(copy.op_id))
    until_puts_end(rig, "a")
    assert answered(rig, Request("b", num_tokens=LONG)) == (5 * PER_BLOCK, True)


def test_a_request_whose_cache_was_cleared_stores_nothing_more(rig: Rig) -> None:
    """A request that ran during a clear stores nothing more: its blocks are stale."""
    answered(rig, Request("a", num_tokens=LONG))
    step = rig.side.build_connector_meta(output(("a", [1, 2, 3, 4])))
    command(rig.side._setup.settings.server_recv_port, "clear")
    rig.agent.say(Ready(tuple(step.puts)))
    until_puts_end(rig, "a")
    assert rig.side.build_connector_meta(goes_on("a", TOKENS, PER_BLOCK, [5])).puts == []


def test_puts_of_what_another_connector_has_not_loaded_are_dropped(rig: Rig) -> None:
    """Puts of blocks that another connector failed to load are dropped and made again."""
    answered(rig, Request("a", num_tokens=LONG))
    answered(rig, Request("x", 1000))
    both = rig.side.build_connector_meta(output(("a", [1, 2, 3, 4]), ("x", [10, 11, 12, 13])))
    dropped, kept = both.puts
    rig.side.transfers.drop_puts_of({2, 40})
    step = rig.side.build_connector_meta(goes_on("a", TOKENS, PER_BLOCK, [5]))
    assert step.dropped == {dropped}
    rig.agent.say(Ready((kept,)))
    copy = rig.agent.hear(Copy)
    assert device_blocks(copy) == [10, 11, 12]
    rig.agent.say(Copied(copy.op_id))
    until_puts_end(rig, "x")
    assert answered(rig, Request("b")) == (0, False)
    assert answered(rig, Request("c", 1000)) == (3 * PER_BLOCK, True)
    # The next put has all blocks again before the end of the dropped one is reported.
    rig.agent.say(Ready(tuple(step.puts)))
    assert device_blocks(rig.agent.hear(Copy)) == [1, 2, 3, 4]


def test_a_scheduler_has_no_block_that_failed_to_load(
    configured: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A scheduler's side returns an empty set of failed blocks, since vLLM joins these sets."""
    monkeypatch.setattr(vllm_v1_adapter, "SchedulerSide", lambda _: SimpleNamespace())
    monkeypatch.setenv("FLEXKV_SERVER_RECV_PORT", f"ipc://{tmp_path}/socket")
    made = vllm_v1_adapter.FlexKVConnectorV1Impl(configured, KVConnectorRole.SCHEDULER)
    assert made.get_block_ids_with_load_errors() == set()


def test_a_worker_offers_no_tokens(
    configured: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker's side offers no tokens."""
    monkeypatch.setattr(vllm_v1_adapter, "_tp_rank", lambda: 0)
    monkeypatch.setenv("FLEXKV_SERVER_RECV_PORT", f"ipc://{tmp_path}/socket")
    made = vllm_v1_adapter.FlexKVConnectorV1Impl(configured, KVConnectorRole.WORKER)
    assert made.get_num_new_matched_tokens(Request("a"), 0) == (0, False)
    made.shutdown()


# -- workers --------------------------------------------------------------------------------------


class Agent:
    """A fake agent that records what a worker reports to the server."""

    def __init__(self, *_: Any) -> None:
        self.told: list[int] = []
        self.told_to_device: list[int] = []
        self.settled: list[int] = []
        self.lent: list[Any] = []
        self.closed = 0

    def start(self, kv_caches: Any) -> None:
        """Record KV caches that are lent."""
        self.lent.append(kv_caches)

    def ready(self, numbers: list[int], to_device: bool = False) -> None:
        """Record requests that may go on, and those of them that write to the device."""
        self.told += numbers
        if to_device:
            self.told_to_device += numbers

    def settle(self, numbers: list[int]) -> None:
        """Record requests of which no copy may be left."""
        self.settled += numbers

    def close(self) -> None:
        """Count the call."""
        self.closed += 1


@pytest.fixture
def side(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return a worker's side over such an agent."""
    monkeypatch.setattr(worker, "Agent", Agent)
    settings = SimpleNamespace(server_recv_port="ipc:///nowhere")
    setup: Any = SimpleNamespace(
        groups=None, settings=settings, model=MODEL, cache=CacheConfig(tokens_per_block=16),
        instance=0, loads_by_layer=False,
    )  # fmt: skip
    return WorkerSide(setup, 0)


def ran(side: Any, step: StepMetadata, drafts: bool) -> None:
    """Report a step as vLLM does, in reverse order if drafts are made."""
    hooks = [side.wait_for_save, side.get_finished]
    for hook in reversed(hooks) if drafts else hooks:
        hook(step)


def fail(side: Any, step: StepMetadata, drafts: bool) -> None:
    """Report a step whose forward raised; with drafts vLLM does not report its end."""
    hooks = [side.get_finished] if drafts else [side.wait_for_save, side.get_finished]
    try:
        _ = 1 // 0
    except ZeroDivisionError:
        for hook in hooks:
            hook(step)


@pytest.mark.parametrize("drafts", [False, True])
def test_nothing_is_read_or_written_of_a_forward_that_has_failed(side: Any, drafts: bool) -> None:
    """Puts and loads of a step whose forward failed are never reported as ready."""
    fail(side, StepMetadata(puts=[1], loads=[2], settle=[3]), drafts)
    for _ in range(STEPS_BEHIND + 2):
        ran(side, StepMetadata(), drafts=False)
    assert (side._agent.told, side._agent.settled) == ([], [3])
    ran(side, StepMetadata(puts=[4], loads=[5]), drafts)
    assert sorted(side._agent.told) == [4, 5]
    assert side._agent.told_to_device == [5]


@pytest.mark.parametrize("beside", [False, True], ids=["alone", "beside_others"])
def test_every_put_is_let_go_once_in_whatever_order_steps_are_told(side: Any, beside: bool) -> None:
    """Each put is reported once, in whatever order vLLM calls: at once, or two steps later."""
    side.beside_others = beside
    for number, drafts in enumerate([True, True, False, False, True, False], start=1):
        ran(side, StepMetadata(puts=[number]), drafts)
        if beside:
            assert number not in side._agent.told
    for _ in range(STEPS_BEHIND + 1):
        ran(side, StepMetadata(), drafts=False)
    assert side._agent.told == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("drafts", [False, True])
def test_puts_that_are_dropped_are_never_let_go_beside_other_connectors(
    side: Any, drafts: bool
) -> None:
    """Beside other connectors, puts that are dropped within two steps are never reported."""
    side.beside_others = True
    ran(side, StepMetadata(puts=[1, 2]), drafts)
    ran(side, StepMetadata(puts=[3], dropped={1}), drafts)
    ran(side, StepMetadata(dropped={3}), drafts)
    for _ in range(STEPS_BEHIND + 1):
        ran(side, StepMetadata(), drafts=False)
    assert side._agent.told == [2]


def test_puts_of_before_a_nap_are_not_let_go_after_it(side: Any) -> None:
    """Puts from before a sleep are not reported after it, since their memory is gone."""
    side.beside_others = True
    ran(side, StepMetadata(puts=[1]), drafts=True)
    ran(side, StepMetadata(puts=[2]), drafts=False)
    side.wait_for_save(StepMetadata(puts=[3]))
    side.suspend()
    for _ in range(STEPS_BEHIND + 2):
        ran(side, StepMetadata(), drafts=False)
    assert side._agent.told == []


def test_a_worker_without_caches_has_none_to_lend_again(side: Any) -> None:
    """A worker that sleeps and wakes before it has KV caches lends none."""
    side.suspend()
    side.resume()
    assert side._agent.lent == []


def test_a_worker_that_sleeps_tells_nobody(side: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker whose agent is closed still reports finished requests."""

    def closed(*_: Any) -> None:
        raise ClosedError("agent")

    monkeypatch.setattr(side._agent, "ready", closed)
    monkeypatch.setattr(side._agent, "settle", closed)
    step = StepMetadata(puts=[1], settle=[2], sent={"a"}, received={"b"})
    side.wait_for_save(step)
    assert side.get_finished(step) == ({"a"}, {"b"})


def test_caches_that_are_lent_anew_are_lent_once(side: Any) -> None:
    """KV caches that are registered anew are lent once, and the agent before is closed."""
    agents = [side._agent]
    for kv_caches in ({"first": 0}, {"second": 0}):
        side.register_kv_caches(kv_caches)
        agents.append(side._agent)
    assert [each.lent for each in agents] == [[], [{"first": 0}], [{"second": 0}]]
    assert [each.closed for each in agents] == [1, 1, 0]
