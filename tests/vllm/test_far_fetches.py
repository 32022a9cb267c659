"""Tests of prompts that wait for far blocks: a real server, and a far tier that the test speeds."""

from __future__ import annotations

from pathlib import Path
from random import Random
from types import SimpleNamespace

import numpy as np
import pytest

from flexkv.index.keys import block_keys
from flexkv.server.wire import Match, Start
from tests.system.conftest import PER_BLOCK
from tests.system.serving import eventually

pytest.importorskip("vllm")

from flexkv.integration.common import far_fetches
from flexkv.integration.common.costs import FIRST
from flexkv.integration.common.far_fetches import WAIT_S_MAX

from .far_rig import ALL, BLOCKS, OP_BLOCKS, TIMEOUT_S, WAITS, Rig, rig
from .test_scheduler_side import Request

__all__ = ["rig"]


def test_a_prompt_waits_for_its_far_blocks_and_loads_them(rig: Rig) -> None:
    """A prompt all of whose blocks lie far is put off while they are fetched, and loads them."""
    rig.served.hold(rig.keys())
    rig.served.pass_transfers(0)
    request = rig.request("a")
    assert [rig.ask(request) for _ in range(3)] == [WAITS] * 3
    assert [type(each) for each in rig.sent] == [Match, Start], "nothing is sent while it waits"
    rig.now_s += 1.0
    rig.fetched()
    assert rig.ask(request) == (ALL, True)
    copy = rig.load(request, [*range(1, BLOCKS + 2)], ALL)
    there = rig.served.content(np.frombuffer(copy.host_ids, np.int64))
    assert there == block_keys(rig.keys()), "the content of a block is its key"
    assert rig.counts() == {
        "fetches": 1, "fetch_waits": 1, "fetch_wait_ms": 1000, "fetched_blocks": BLOCKS,
    }  # fmt: skip
    rig.side.request_finished(request)
    eventually(rig.served.idle)


def test_a_fetch_begins_behind_what_is_here(rig: Rig) -> None:
    """What is here already is not fetched, and what the device has is not waited for."""
    rig.store(3)
    rig.served.hold(rig.keys())
    request = rig.request("a")
    assert rig.ask(request) == WAITS
    rig.fetched()
    assert rig.ask(request) == (ALL, True)
    assert rig.served.fetched(rig.keys()) == [0] * 3 + [1] * 5
    other = rig.request("b", 1000)
    rig.served.hold(rig.keys(1000))
    assert rig.side.get_num_new_matched_tokens(other, ALL) == (0, False)
    assert rig.counts()["fetches"] == 1


def test_what_is_late_serves_later_prompts(rig: Rig) -> None:
    """A prompt runs with what has arrived in time; the rest arrives for the next one."""
    rig.served.hold(rig.keys())
    rig.served.pass_transfers(1)
    request = rig.request("a")
    assert rig.ask(request) == WAITS
    eventually(lambda: rig.served.fetched(rig.keys())[OP_BLOCKS - 1])
    rig.now_s += TIMEOUT_S - 0.01
    assert rig.ask(request) == WAITS
    rig.now_s += 0.01
    assert rig.ask(request) == (OP_BLOCKS * PER_BLOCK, True)
    rig.load(request, [*range(1, BLOCKS + 2)], OP_BLOCKS * PER_BLOCK)
    rig.fetched()
    assert rig.ask(rig.request("b")) == (ALL, True)
    assert rig.served.fetched(rig.keys()) == [1] * BLOCKS
    assert rig.counts() == {
        "fetches": 1, "fetch_waits": 1, "fetch_wait_ms": 2000, "fetched_blocks": OP_BLOCKS,
        "late_fetched_blocks": OP_BLOCKS,
    }  # fmt: skip


@pytest.mark.parametrize("arrives", [0, 3])
def test_a_wrong_hint_costs_a_fetch_and_never_a_load(rig: Rig, arrives: int) -> None:
    """What others have lost is computed: no load is offered that could fail, and none fails."""
    rig.served.hold(rig.keys())
    rig.served.lose(rig.keys(), arrives)
    request = rig.request("a")
    assert rig.ask(request) == WAITS
    rig.fetched()
    offered = (arrives * PER_BLOCK, arrives > 0)
    assert rig.ask(request) == offered
    if arrives:
        rig.load(request, [*range(1, BLOCKS + 2)], arrives * PER_BLOCK)
    step = rig.step(("a", [*range(1, BLOCKS + 2)]))
    assert (step.failed, step.failed_blocks) == (set(), set())
    told = rig.counts()
    assert told["missing_far_blocks"] == BLOCKS - arrives
    assert rig.ask(rig.request("b"))[0] == offered[0], "the hint was dropped, so nothing waits"
    assert rig.counts() == {}


def test_a_far_tier_that_fails_costs_no_load(rig: Rig) -> None:
    """If the store is broken, prompts are computed, and one prompt asks it once."""
    rig.served.hold(rig.keys())
    rig.served.call(lambda: setattr(rig.served.port._faults, "failure_probability", 1.0))
    request = rig.request("a")
    assert rig.ask(request) == WAITS
    rig.fetched()
    arrived = rig.served.fetched(rig.keys()).count(1)
    assert arrived < OP_BLOCKS, "an op of the fake moves some blocks before it fails"
    assert [rig.ask(request) for _ in range(3)] == [(arrived * PER_BLOCK, arrived > 0)] * 3
    told = rig.counts()
    assert (told["fetches"], told["missing_far_blocks"]) == (1, BLOCKS - arrived)


def test_an_aborted_prompt_fetches_no_more(rig: Rig) -> None:
    """When a prompt is aborted, what has not begun to arrive is not fetched; nothing is left."""
    rig.served.hold(rig.keys())
    rig.served.pass_transfers(0)
    request = rig.request("a")
    assert rig.ask(request) == WAITS
    eventually(lambda: rig.served.port.waiting)
    assert rig.side.request_finished(request) is False
    rig.step()
    assert (rig.side._states, rig.side._fetches._of_request) == ({}, {})
    rig.fetched()
    eventually(rig.served.idle)


@pytest.mark.parametrize("is_aborted", [False, True])
def test_prompts_with_the_same_far_blocks_fetch_them_once(rig: Rig, is_aborted: bool) -> None:
    """The second prompt waits for the first one's fetch, and gets all even if that is aborted."""
    rig.served.hold(rig.keys())
    rig.served.pass_transfers(0)
    first, second = rig.request("a"), rig.request("b")
    assert [rig.ask(first), rig.ask(second)] == [WAITS] * 2
    if is_aborted:
        rig.side.request_finished(first)
        rig.step()
    rig.fetched()
    assert rig.ask(second) == (ALL, True)
    if not is_aborted:
        assert rig.ask(first) == (ALL, True)
        assert rig.served.fetched(rig.keys()) == [1] * BLOCKS


def test_other_prompts_pass_one_that_waits(rig: Rig) -> None:
    """While a prompt waits for far blocks, younger ones are served in the same step."""
    rig.store(3, 1000)
    rig.served.hold(rig.keys())
    rig.served.pass_transfers(0)
    assert rig.ask(rig.request("a")) == WAITS
    assert rig.ask(rig.request("b", 1000)) == (3 * PER_BLOCK, True)
    assert rig.ask(rig.request("c", 2000)) == (0, False)


@pytest.mark.parametrize("rig", [{"prefetch_stop": "best_effort"}], indirect=True)
def test_with_best_effort_a_prompt_runs_with_what_has_arrived(rig: Rig) -> None:
    """A prompt is never put off for far blocks; they are fetched while it is in the queue."""
    rig.served.hold(rig.keys())
    assert rig.ask(rig.request("a")) == (0, False)
    queued = rig.request("b")
    rig.side.on_new_request(queued)
    eventually(lambda: (rig.step(), rig.counts().get("fetches"))[1])
    rig.fetched()
    assert rig.ask(queued) == (ALL, True)
    assert rig.counts() == {"fetched_blocks": BLOCKS}


def test_a_prompt_is_fetched_for_while_it_is_queued(rig: Rig) -> None:
    """By the time that the engine comes to a queued prompt, it need not wait any more."""
    rig.served.hold(rig.keys())
    rig.served.hold(rig.keys(2000))
    requests = [rig.request("a"), rig.request("b", 1000), rig.request("c", 2000)]
    for request in requests:
        rig.side.on_new_request(request)
    eventually(lambda: (rig.step(), len(rig.side._fetches._of_request) == 2)[1])
    rig.now_s += 1000.0
    rig.fetched()
    assert [rig.ask(each) for each in requests] == [(ALL, True), (0, False), (ALL, True)]
    assert rig.counts() == {"fetches": 2, "fetched_blocks": 2 * BLOCKS}


@pytest.mark.parametrize("rig", [{"prefetch_stop": "complete"}], indirect=True)
def test_with_complete_a_prompt_waits_to_the_end_but_not_for_ever(rig: Rig) -> None:
    """A prompt waits until its fetch is over, and runs after a minute without an end."""
    rig.served.hold(rig.keys())
    rig.served.pass_transfers(0)
    request = rig.request("a")
    assert rig.ask(request) == WAITS
    rig.now_s += WAIT_S_MAX - 1
    assert rig.ask(request) == WAITS
    rig.now_s += 1
    assert rig.ask(request) == (0, False)
    other = rig.request("b")
    assert rig.ask(other) == WAITS
    rig.fetched()
    assert rig.ask(other) == (ALL, True)


def test_a_prompt_waits_no_longer_than_computing_takes(rig: Rig) -> None:
    """Once the cost of a token is known, it bounds the wait, and decides what is fetched."""
    costs = rig.side._costs
    assert costs is not None
    costs._token.seconds, costs._token.values = 0.01, FIRST
    rig.served.hold(rig.keys())
    rig.served.pass_transfers(0)
    request = rig.request("a")
    assert rig.ask(request) == WAITS
    rig.now_s += 0.01 * ALL
    assert rig.ask(request) == (0, False)
    rig.fetched()
    for _ in range(FIRST):
        costs.fetched({"remote": 8}, 0, 1.0)
    rig.served.hold(rig.keys(1000))
    assert rig.ask(rig.request("b", 1000)) == (0, False)
    assert rig.counts()["declined_far_blocks"] == BLOCKS


def test_a_prompt_fetches_once_in_its_life(rig: Rig) -> None:
    """A preempted prompt is matched again, and neither fetches nor waits a second time."""
    rig.served.hold(rig.keys())
    rig.served.pass_transfers(0)
    request = rig.request("a")
    assert rig.ask(request) == WAITS
    rig.now_s += TIMEOUT_S
    assert rig.ask(request) == (0, False)
    assert rig.ask(request) == (0, False)
    rig.fetched()
    assert rig.ask(request) == (ALL, True)
    assert rig.counts()["fetches"] == 1


def test_after_a_reset_a_prompt_begins_anew(rig: Rig) -> None:
    """A reset ends the fetches from before; a prompt that waited for one is matched again."""
    rig.served.hold(rig.keys())
    rig.served.pass_transfers(0)
    request = rig.request("a")
    assert rig.ask(request) == WAITS
    eventually(lambda: rig.served.port.waiting)
    rig.served.call(rig.served.far.hinted.clear)
    assert rig.side.reset_cache()
    assert rig.ask(request) == (0, False)
    rig.fetched()
    assert rig.ask(rig.request("b")) == (0, False), "what was fetched is from before the reset"
    eventually(rig.served.idle)


def test_when_the_server_is_lost_nobody_waits(rig: Rig) -> None:
    """A prompt that waits for a fetch of a server that is gone is computed."""
    rig.served.hold(rig.keys())
    rig.served.pass_transfers(0)
    request = rig.request("a")
    assert rig.ask(request) == WAITS
    rig.side.client.give_up("planted")
    assert rig.ask(request) == (0, False)
    assert not rig.side._fetches.waits(rig.side._states["a"].transfers)
    assert rig.side._fetches.blocks_under_way == 0
    rig.served.pass_transfers(None)
    eventually(rig.served.idle)


def test_closing_leaves_nothing_at_the_server(rig: Rig) -> None:
    """When an engine ends while it fetches, the server has nothing under way for it."""
    rig.served.hold(rig.keys())
    rig.served.pass_transfers(0)
    assert rig.ask(rig.request("a")) == WAITS
    eventually(lambda: rig.served.port.waiting)
    rig.side.close()
    rig.served.pass_transfers(None)
    eventually(rig.served.idle)


def messages(rig: Rig) -> list[str]:
    """Return the kinds of messages by which prompts without far blocks are served."""
    rig.store(3)
    for name, seed in (("a", 0), ("b", 1000)):
        request = rig.request(name, seed)
        rig.side.on_new_request(request)
        rig.step()
        rig.ask(request)
        rig.side.request_finished(request)
    rig.step()
    told = [type(each).__name__ for each in rig.sent]
    rig.close()
    return told


def test_prompts_without_far_blocks_are_served_as_ever(tmp_path: Path) -> None:
    """A far tier that has other prompts only costs no message, and no prompt waits."""
    for name in ("near", "far"):
        (tmp_path / name).mkdir()
    near, far = Rig(tmp_path / "near", has_far=False), Rig(tmp_path / "far")
    far.served.hold(far.keys(5000))
    assert messages(far) == messages(near)


@pytest.mark.parametrize("seed", range(12))
def test_whatever_others_do_no_load_fails_and_nothing_is_left(
    tmp_path: Path, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Others store, lose and damage blocks; prompts come, wait and are aborted; fetches are slow.

    Every prompt gets an offer in bounded time, no load comes short, and all claims end.
    """
    chance = Random(seed)
    stop = chance.choice(["best_effort", "complete", "timeout"])
    rig = Rig(tmp_path, prefetch_stop=stop, num_cpu_blocks=chance.choice([40, 128]))
    monkeypatch.setattr(far_fetches, "time", SimpleNamespace(monotonic=lambda: rig.now_s))
    prompts = {seed: rig.keys(seed) for seed in (0, 1000, 2000)}
    waiting: dict[str, tuple[Request, float]] = {}
    for number in range(150):
        rig.now_s += chance.choice([0.0, 0.2])
        which = chance.choice(list(prompts))
        what = chance.random()
        if what < 0.25:
            rig.served.call(lambda keys=prompts[which]: rig.served.far.live(chance, keys))
        elif what < 0.4:
            rig.served.pass_transfers(chance.choice([0, 1, 2, None]))
        elif what < 0.45:
            rig.side.reset_cache()
        elif what < 0.7 and len(waiting) < 6:
            request = rig.request(f"{number}", which)
            if chance.random() < 0.2:
                request.kv_transfer_params = {  # type: ignore[attr-defined]
                    "load_deadline_ms": chance.choice([0, 300, "soon"])
                }
            if chance.random() < 0.5:
                rig.side.on_new_request(request)
            waiting[request.request_id] = request, rig.now_s
        elif waiting and what < 0.75:
            rig.side.request_finished(waiting.pop(chance.choice(list(waiting)))[0])
        else:
            _serve(rig, waiting)
        rig.step()
    rig.served.pass_transfers(None)
    rig.now_s += WAIT_S_MAX
    eventually(lambda: (rig.step(), _serve(rig, waiting), not waiting)[2])
    rig.fetched()
    eventually(lambda: (rig.step(), rig.served.idle())[1])
    assert rig.side._fetches._of_request == {}
    rig.close()


def _serve(rig: Rig, waiting: dict[str, tuple[Request, float]]) -> None:
    """Try all prompts, load what they are offered, and end those that need not wait."""
    for name, (request, _) in list(waiting.items()):
        tokens, is_slow = rig.ask(request)
        if tokens is None:
            continue
        if tokens:
            assert is_slow
            rig.load(request, [*range(1, BLOCKS + 2)], tokens)
        rig.side.request_finished(request)
        del waiting[name]
