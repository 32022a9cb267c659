"""Tests of the scheduler's side at a real server, with an agent that sends what the test says."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from flexkv.server.operator import command
from flexkv.server.wire import Copied, Copy, Ready
from tests.system.conftest import MODEL, PER_BLOCK
from tests.system.serving import Peer, eventually, settings_in

pytest.importorskip("vllm")

import huggingface_hub
from vllm.lora.request import LoRARequest

from flexkv.integration.common import costs
from flexkv.integration.common import pending_matches as questions
from flexkv.integration.vllm.scheduler import SchedulerSide
from flexkv.integration.vllm.setup import Setup

TOKENS = 3 * PER_BLOCK + 1


@dataclass
class Request:
    """The parts of vLLM's request that are used."""

    request_id: str
    seed: int = 0
    lora_request: Any = None
    cache_salt: Any = None
    prompt_embeds: Any = None
    mm_features: list[Any] = field(default_factory=list)
    num_output_tokens: int = 0
    num_tokens: int = TOKENS

    @property
    def all_token_ids(self) -> list[int]:
        """Return its tokens."""
        return list(range(self.seed, self.seed + self.num_tokens))

    @property
    def block_hashes(self) -> list[bytes]:
        """Return vLLM's hashes of its blocks."""
        return [f"{self.seed} {n}".encode().ljust(32) for n in range(self.num_tokens // PER_BLOCK)]


def output(*new: tuple[str, list[int]]) -> Any:
    """Return a step that prefills requests into blocks."""
    return SimpleNamespace(
        scheduled_new_reqs=[
            SimpleNamespace(req_id=name, block_ids=(blocks,), num_computed_tokens=0)
            for name, blocks in new
        ],
        scheduled_cached_reqs=SimpleNamespace(
            req_ids=[], new_block_ids=[], num_computed_tokens=[], resumed_req_ids=set()
        ),
        num_scheduled_tokens={name: TOKENS for name, _ in new},
        scheduled_spec_decode_tokens={},
    )  # fmt: skip


class Rig:
    """A scheduler's side, its server, and the agent of its one rank."""

    def __init__(self, folder: Path, match_wait_ms: float = 10_000, **cache: Any) -> None:
        waits = {"match_wait_ms": match_wait_ms, "server_answer_ms": 250}
        settings = settings_in(folder, **cache).model_copy(update=waits)
        setup = Setup(MODEL, settings, 0, launches=True, tells_events=True)
        self.side = SchedulerSide(setup)
        self.agent = Peer(settings, "agent")
        eventually(self.side._ready)
        assert self.side._launched is not None
        self.pid = self.side._launched.pid

    def status(self) -> Any:
        """Return the server's statistics."""
        return command(self.side._setup.settings.server_recv_port, "status")["statistics"]

    def begin(self, name: str, blocks: list[int], seed: int = 0, **more: Any) -> Copy:
        """Prefill a request, and return the copy that its put has started."""
        answered(self, Request(name, seed, **more))
        step = self.side.build_connector_meta(output((name, blocks)))
        self.agent.say(Ready(tuple(step.puts)))
        copy: Copy = self.agent.hear(Copy)
        return copy

    def step_until(self, what: str) -> Any:
        """Step until a step reports this, and return that step."""
        return eventually(
            lambda: (s := self.side.build_connector_meta(output())) and getattr(s, what) and s
        )


@pytest.fixture
def rig(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Rig]:
    """Yield a rig; the parameter is `match_wait_ms`, and by default steps wait long."""
    made = Rig(tmp_path, *([request.param] if hasattr(request, "param") else []))
    yield made
    made.agent.close()
    made.side.close()


def test_an_aborted_load_that_waits_for_its_puts_is_over_once(rig: Rig) -> None:
    """An aborted load that waits for puts ends once, as `received`, and never also as `sent`."""
    copy = rig.begin("a", [1, 2, 3, 4])
    request = Request("a")
    extra, later = rig.side.get_num_new_matched_tokens(request, 0)
    assert (extra, later) == (3 * PER_BLOCK, True)
    blocks = SimpleNamespace(get_block_ids=lambda: ([5, 6, 7, 8],))
    rig.side.update_state_after_alloc(request, blocks, extra)
    assert rig.side.request_finished(request) is False
    assert not rig.side.build_connector_meta(output()).received
    rig.agent.say(Copied(copy.op_id))
    step = rig.step_until("received")
    assert (step.received, step.sent, step.failed_blocks) == ({"a"}, set(), set())
    assert rig.side._states == {}


def test_blocks_stay_until_the_puts_that_read_them_are_over(rig: Rig) -> None:
    """Blocks of an ended request stay until the puts that read them are over."""
    copy = rig.begin("a", [1, 2, 3, 4])
    assert rig.side.request_finished(Request("a")) is True
    assert not rig.side.build_connector_meta(output()).sent
    rig.agent.say(Copied(copy.op_id))
    assert rig.step_until("sent").sent == {"a"}


def test_what_a_request_stores_last_is_announced(rig: Rig) -> None:
    """The last blocks of a request are announced, though it has ended by then."""
    copy = rig.begin("a", [1, 2, 3, 4])
    rig.side.request_finished(Request("a"))
    rig.agent.say(Copied(copy.op_id))
    rig.step_until("sent")
    (stored,) = [event for event in rig.side.step_ended() if event.medium == "CPU"]
    assert len(stored.block_hashes) == 3
    assert rig.side._states == {}


def test_a_step_waits_for_puts_that_read_what_it_writes(rig: Rig) -> None:
    """A step waits for the puts that read blocks which it writes, and for no others."""
    copy = rig.begin("a", [1, 2, 3, 4])
    rig.side.get_num_new_matched_tokens(Request("b", 1000), 0)
    threading.Timer(0.1, lambda: rig.agent.say(Copied(copy.op_id))).start()
    begin = time.monotonic()
    rig.side.build_connector_meta(output(("b", [9, 2, 3, 10])))
    assert 0.09 < time.monotonic() - begin < 0.24
    begin = time.monotonic()
    rig.side.get_num_new_matched_tokens(Request("c", 2000), 0)
    rig.side.build_connector_meta(output(("c", [11, 12, 13, 14])))
    assert time.monotonic() - begin < 0.09


def test_a_step_waits_for_puts_that_read_what_it_zeroes(rig: Rig) -> None:
    """vLLM zeroes new blocks even of a prompt that loads, in groups that are not transferred."""
    copy = rig.begin("a", [1, 2, 3, 4])
    threading.Timer(0.1, lambda: rig.agent.say(Copied(copy.op_id))).start()
    step, begin = output(), time.monotonic()
    step.new_block_ids_to_zero = [9, 2]
    rig.side.build_connector_meta(step)
    assert 0.09 < time.monotonic() - begin < 0.24


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_step_does_not_wait_for_a_server_that_is_gone(rig: Rig, number: int) -> None:
    """A step does not wait for a server that is gone; its puts and earlier ones are not stored."""
    rig.begin("a", [1, 2, 3, 4])
    rig.side.get_num_new_matched_tokens(Request("b", 1000), 0)
    threading.Timer(0.05, lambda: os.kill(rig.pid, number)).start()
    begin = time.monotonic()
    step = rig.side.build_connector_meta(output(("b", [9, 2, 3, 10])))
    assert time.monotonic() - begin < 1.0
    assert len(step.puts) == 1
    os.kill(rig.pid, signal.SIGCONT) if number is signal.SIGSTOP else None
    for name in ("a", "b"):
        rig.side.request_finished(Request(name))
    eventually(lambda: (rig.side.build_connector_meta(output()), not rig.side._states)[1])
    assert not rig.side.transfers.blocks.readers.any()


def stored(rig: Rig) -> None:
    """Put the prompt of request "a", and wait for its end."""
    rig.agent.say(Copied(rig.begin("a", [1, 2, 3, 4]).op_id))
    eventually(lambda: (rig.side._poll(), not rig.side._states["a"].transfers.puts)[1])
    rig.side.take_stats()


def answered(rig: Rig, request: Request) -> tuple[int, bool]:
    """Ask until the answer for a request is there, and return it."""
    told: tuple[int | None, bool] = None, False

    def asked() -> bool:
        nonlocal told
        told = rig.side.get_num_new_matched_tokens(request, 0)
        return told[0] is not None

    eventually(asked)
    assert told[0] is not None
    return told[0], told[1]


@pytest.mark.parametrize("rig", [0.25], indirect=True)
def test_a_prompt_of_which_the_server_says_nothing_is_put_off(rig: Rig) -> None:
    """A prompt without an answer is put off; its question and hold stay until the request ends."""
    stored(rig)
    os.kill(rig.pid, signal.SIGSTOP)
    requests = [Request("b"), Request("c"), Request("d", 1000)]
    for _ in range(2):
        asked = [rig.side.get_num_new_matched_tokens(request, 0) for request in requests]
        assert asked == [(None, False)] * 3
        rig.side.build_connector_meta(output())
    os.kill(rig.pid, signal.SIGCONT)
    assert rig.side.request_finished(requests[1]) is False
    told = [answered(rig, request) for request in (requests[2], requests[0])]
    assert told == [(0, False), (3 * PER_BLOCK, True)]
    counts = rig.side.take_stats().reduce()
    assert (counts["matches"], counts["late_matches"] >= 6) == (2, True)
    assert rig.status()["tiers"]["host"]["pinned_blocks"] == 3
    rig.side.request_finished(requests[0])
    rig.side.build_connector_meta(output())
    eventually(lambda: rig.status()["tiers"]["host"]["pinned_blocks"] == 0)


@pytest.mark.parametrize("rig", [0.25], indirect=True)
def test_prompts_that_wait_in_line_hold_little_and_not_for_long(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many prompts wait in line, holds are few, end after a while, and are then renewed."""
    stored(rig)
    monkeypatch.setattr(questions, "KEPT_S", 60.0)
    rig.side.client._answer_s = 60.0  # the server may be slow here
    os.kill(rig.pid, signal.SIGSTOP)
    requests = [Request(f"{n}") for n in range(3 * questions.ASKED_MAX)]
    asked = [rig.side.get_num_new_matched_tokens(request, 0) for request in requests]
    assert asked == [(None, False)] * len(requests)
    os.kill(rig.pid, signal.SIGCONT)
    rig.side.build_connector_meta(output())
    eventually(lambda: rig.status()["claims"] == questions.ASKED_MAX)
    monkeypatch.setattr(questions, "KEPT_S", 0.0)
    rig.side.build_connector_meta(output())
    eventually(lambda: rig.status()["claims"] == 0)
    assert answered(rig, requests[-1]) == answered(rig, requests[0]) == (3 * PER_BLOCK, True)


@pytest.mark.parametrize("rig", [0.25], indirect=True)
def test_what_was_asked_before_a_reset_is_asked_anew(rig: Rig) -> None:
    """After a reset a waiting prompt is asked anew, since loading cleared blocks would fail."""
    stored(rig)
    os.kill(rig.pid, signal.SIGSTOP)
    request = Request("b")
    assert rig.side.get_num_new_matched_tokens(request, 0) == (None, False)
    os.kill(rig.pid, signal.SIGCONT)
    eventually(lambda: rig.status()["claims"])
    assert rig.side.reset_cache()
    assert answered(rig, request) == (0, False)
    eventually(lambda: rig.status()["claims"] == 0)


@pytest.mark.parametrize("rig", [0.25], indirect=True)
def test_a_server_that_says_nothing_for_long_is_left(rig: Rig) -> None:
    """A server that does not answer for long is left, and its prompts are computed."""
    stored(rig)
    os.kill(rig.pid, signal.SIGSTOP)
    requests = [Request("b"), Request("c")]
    asked = [rig.side.get_num_new_matched_tokens(request, 0) for request in requests]
    assert asked == [(None, False)] * 2
    for request in requests:
        eventually(lambda r=request: rig.side.get_num_new_matched_tokens(r, 0) == (0, False))
    assert not rig.side.client.is_ready
    os.kill(rig.pid, signal.SIGCONT)
    eventually(lambda: rig.side.get_num_new_matched_tokens(Request("d"), 0)[0])


def test_a_load_slower_than_computing_is_not_offered(rig: Rig) -> None:
    """A load slower than computing is not offered, is counted once, and holds nothing."""
    stored(rig)
    known = rig.side._costs
    assert known is not None
    for _ in range(3):
        known.loaded({"host": 20}, 2.0)
        known.step_begins(1000)
        for _ in range(4):  # also ends the earlier steps
            known.step_ends()
    for _ in range(2):
        assert rig.side.get_num_new_matched_tokens(Request("c"), 0) == (0, False)
    assert rig.side.take_stats().reduce()["declined_blocks"] == 3
    rig.side.build_connector_meta(output())
    eventually(lambda: rig.status()["claims"] == 0)


def test_a_load_is_measured_when_it_ends(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a load has ended whole, no other is offered to an engine whose computing costs less."""
    for name, value in (("FIRST", 1), ("BLOCKS_MIN", 1), ("TOKENS_MIN", 1 << 60)):
        monkeypatch.setattr(costs, name, value)
    stored(rig)
    request, blocks = Request("b"), SimpleNamespace(get_block_ids=lambda: ([5, 6, 7, 8],))
    rig.side.update_state_after_alloc(request, blocks, answered(rig, request)[0])
    rig.side.build_connector_meta(output())
    rig.agent.say(Copied(rig.agent.hear(Copy).op_id))
    assert rig.step_until("received").received == {"b"}
    assert rig.side._costs is not None
    rig.side._costs.step_begins(1 << 60)  # tokens, in next to no time
    for _ in range(costs.STEPS_MAX):
        rig.side._costs.step_ends()
    assert answered(rig, Request("c")) == (0, False)


def test_what_needs_every_tokens_output_loads_nothing(rig: Rig) -> None:
    """Requests that need each token's output, or have embeddings or another salt, load nothing."""
    rig.agent.say(Copied(rig.begin("a", [1, 2, 3, 4]).op_id))
    eventually(lambda: rig.side.get_num_new_matched_tokens(Request("b"), 0)[0] > 0)
    wanting = Request("c")
    wanting.skip_reading_prefix_cache = True  # type: ignore[attr-defined]
    assert rig.side.get_num_new_matched_tokens(wanting, 0) == (0, False)
    embedded = Request("d", prompt_embeds=np.zeros(3))
    assert rig.side.get_num_new_matched_tokens(embedded, 0) == (0, False)
    salted = Request("e", cache_salt="other")
    assert rig.side.get_num_new_matched_tokens(salted, 0) == (0, False)


def image(name: str) -> Any:
    """Return an image that stands behind the second block."""
    where = SimpleNamespace(offset=PER_BLOCK, length=PER_BLOCK)
    return SimpleNamespace(mm_position=where, identifier=name)


def test_a_session_that_gets_an_image_has_other_keys(rig: Rig) -> None:
    """If a session gets an image, blocks behind it have other keys; those before it are found."""
    stored(rig)
    session = Request("b")
    assert answered(rig, session) == (3 * PER_BLOCK, True)
    session.mm_features.append(image("cat"))
    assert answered(rig, session) == (PER_BLOCK, True)


def test_a_session_that_gets_an_image_without_a_name_is_cached_no_more(rig: Rig) -> None:
    """A session that gets an image without a name stores and loads no more; its blocks stay."""
    stored(rig)
    session = Request("b")
    assert answered(rig, session) == (3 * PER_BLOCK, True)
    session.mm_features.append(image("renderer0-mm-0-image-0"))
    assert answered(rig, session) == (0, False)
    assert not rig.side.build_connector_meta(output(("b", [5, 6, 7, 8]))).puts
    assert answered(rig, Request("c")) == (3 * PER_BLOCK, True)


def test_an_adapter_that_was_trained_again_finds_nothing(rig: Rig, tmp_path: Path) -> None:
    """A retrained adapter finds nothing of the earlier one with the same name and path."""
    file = tmp_path / "adapter_model.safetensors"
    file.write_bytes(bytes(64))
    adapter = LoRARequest("adapter", 1, str(file))
    rig.agent.say(Copied(rig.begin("a", [1, 2, 3, 4], lora_request=adapter).op_id))
    eventually(lambda: (rig.side._poll(), not rig.side._states["a"].transfers.puts)[1])
    assert answered(rig, Request("b", lora_request=adapter)) == (3 * PER_BLOCK, True)
    assert answered(rig, Request("c")) == (0, False)
    file.write_bytes(bytes(63) + b"1")
    for name, again in (("d", adapter), ("e", LoRARequest("adapter", 2, str(file)))):
        assert answered(rig, Request(name, lora_request=again)) == (0, False)


def test_an_adapter_of_the_hub_is_cached_once_it_has_run(
    rig: Rig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An adapter of the hub is cached once it has run; before, another commit may be fetched."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    repo = tmp_path / "hub" / "models--org--adapter"
    for folder in (repo / "snapshots" / ("a" * 40), repo / "refs"):
        folder.mkdir(parents=True)
    (repo / "snapshots" / ("a" * 40) / "adapter_model.bin").write_bytes(b"1")
    (repo / "refs" / "main").write_text("a" * 40)
    adapter = LoRARequest("adapter", 1, "org/adapter")
    first = Request("a", lora_request=adapter)
    answered(rig, first)
    assert not rig.side.build_connector_meta(output(("a", [1, 2, 3, 4]))).puts
    first.num_output_tokens = 1
    rig.side.request_finished(first)
    rig.begin("b", [5, 6, 7, 8], lora_request=adapter)
