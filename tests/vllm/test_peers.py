"""Tests that real engines read what they need from each other's host memory, over a real Redis.

Each `vllm serve` has a FlexKV server and host memory of its own, and no SSD. What one of them has
computed is asked of the other. The prompts end eight tokens behind a whole span, so everything else
of them can be fetched.
"""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from flexkv.index.spans import SPAN_TOKENS_MAX
from flexkv.server.operator import command
from flexkv.testing.redis_server import RedisServer
from flexkv.testing.vllm_serve import OWN, Served, VllmServe

from .conftest import wait_gone
from .conversations import Conversations, Sizes
from .hybrids import Hybrids, case, check_sound, different
from .test_events import Router
from .test_kills import eventually
from .test_serve import ARGUMENTS, ENVIRONMENT, counted, wait_lent

BLOCK_TOKENS, SPANS, PROMPTS, ANSWER = 32, 2, 3, 12
WHOLE = SPANS * SPAN_TOKENS_MAX
"""Tokens of a prompt that are in whole spans, so that another node can be asked for them."""
CPU = "CPU"
"""What KV events call host memory."""


def prompts(seed: int) -> list[list[int]]:
    """Return prompts that share no block with those of another seed."""
    return Conversations(Sizes(PROMPTS, first_tokens=WHOLE + 8, seed=1000 + seed)).prompts


class Engine:
    """A `vllm serve` and its FlexKV server."""

    def __init__(self, serve: VllmServe) -> None:
        self.serve = serve
        self._asked: set[tuple[int, ...]] = set()

    def ready(self) -> Engine:
        """Wait until it answers, and its memory is lent."""
        self.serve.wait_ready()
        wait_lent(self.serve, 1)
        return self

    @property
    def server(self) -> int:
        """Return the process of its FlexKV server."""
        pid: int = command(self.serve.address, "status")["pid"]
        return pid

    @property
    def statistics(self) -> Any:
        """Return the statistics of its FlexKV server."""
        return command(self.serve.address, "status")["statistics"]

    def ask(self, asked: list[list[int]]) -> tuple[list[list[int]], list[int]]:
        """Ask several prompts at once; return the answers, and how many tokens of each were hit."""
        self.serve.forget()
        self._asked.update(map(tuple, asked))
        with ThreadPoolExecutor(len(asked)) as pool:
            told = list(pool.map(lambda prompt: self.serve.complete(prompt, ANSWER), asked))
        return [answer for answer, _ in told], [hit for _, hit in told]

    def knows(self, other: Engine) -> None:
        """Wait until it knows that another engine has everything that it was asked."""
        spans = sum(len(prompt) // SPAN_TOKENS_MAX for prompt in other._asked)
        theirs = other.statistics["cluster"]["state"]["life"]

        def known() -> bool:
            nodes = self.statistics["cluster"]["state"]["nodes"]
            return any(node["life"] == theirs and node["spans"] == spans for node in nodes)

        eventually(known)

    def is_idle(self) -> bool:
        """Return whether nothing of its host memory is held."""
        told = self.statistics
        return not (told["claims"] or told["runs_in_flight"])

    def kill(self) -> None:
        """Kill it and its FlexKV server, as `kill -9` does."""
        server = self.server
        os.kill(server, signal.SIGKILL)
        self.serve.kill()
        wait_gone(server)


class Pair:
    """Two engines that share blocks; whoever was killed is started again.

    Attributes:
        router: hears the KV events of the second one.
    """

    def __init__(self, model: str, folder: Path, redis: RedisServer, stack: ExitStack) -> None:
        self._model, self._folder, self._stack = model, folder, stack
        self._starts = 0
        self._keys: dict[str, Any] = {
            "enable_p2p_cpu": True, "redis_host": "127.0.0.1", "redis_port": redis.port,
            "redis_password": redis.password, "local_ip": "127.0.0.1", "node_ttl_seconds": 3.0,
            "io_deadline_s": 10.0,
        }  # fmt: skip
        self.router = Router()
        stack.callback(self.router.end)
        self.first, self.second = self.start(), self.start(events=self.router.endpoint)
        for engine in (self.first, self.second):
            engine.ready()

    def start(self, events: str = "", by_file: bool = False) -> Engine:
        """Start an engine, whose keys vLLM's configuration has, or the file of FlexKV's."""
        self._starts += 1
        (folder := self._folder / str(self._starts)).mkdir()
        cache = {"num_cpu_blocks": 512, "num_ssd_blocks": 0, "load_if_faster": False}
        settings: dict[str, Any] = {"server_answer_ms": 60_000, "prefetch_stop": "complete"}
        extra = self._keys
        if by_file:
            cache, extra = {**cache, **self._keys}, {}
        connector = {**OWN, "kv_connector_extra_config": extra}
        arguments = list(ARGUMENTS)
        if events:
            told = {"enable_kv_cache_events": True, "publisher": "zmq", "endpoint": events}
            arguments += ["--kv-events-config", json.dumps(told)]
        settings["cache_config"] = cache
        served = Served(Path(self._model), connector, settings, tuple(arguments), ENVIRONMENT)
        serve = self._stack.enter_context(VllmServe(served, folder))
        self._stack.callback(serve.kill)
        return Engine(serve)


@pytest.fixture(scope="module")
def redis() -> Iterator[RedisServer]:
    """Yield a running Redis."""
    server = RedisServer(password="of these tests")
    server.start()
    yield server
    server.close()


@pytest.fixture(scope="module")
def pair(
    model: str, redis: RedisServer, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Pair]:
    """Yield two engines that stay up over the tests."""
    with ExitStack() as stack:
        yield Pair(model, tmp_path_factory.mktemp("peers"), redis, stack)


def blocks_of(asked: list[list[int]]) -> set[tuple[int, ...]]:
    """Return the tokens of each block that can be fetched."""
    starts = range(0, WHOLE, BLOCK_TOKENS)
    return {tuple(prompt[at : at + BLOCK_TOKENS]) for prompt in asked for at in starts}


def announced(router: Router) -> set[tuple[int, ...]]:
    """Return the tokens of each block that events say to be in host memory."""
    return {tuple(router.tokens[name]) for name, where in list(router.there) if where == CPU}


@pytest.mark.support("feature", "engines that share their host memory, over Redis", "served")
def test_an_engine_hits_what_another_one_has_computed(pair: Pair) -> None:
    """Answers are equal, all whole spans are hits from the peer, and events tell of them then.

    What only the other one has is in no event, although it is known.
    """
    first, second, asked = pair.first, pair.second, prompts(0)
    answers, cached = first.ask(asked)
    assert cached == [0] * PROMPTS
    second.knows(first)
    second.ask([[7] * 40])
    assert blocks_of(asked).isdisjoint(announced(pair.router))

    assert second.ask(asked) == (answers, [WHOLE] * PROMPTS)
    fetched = counted(second.serve, "flexkv_connector_fetched_blocks_total") * BLOCK_TOKENS
    assert fetched == PROMPTS * WHOLE
    (read,) = second.statistics["cluster"]["read"].values()
    assert (read["blocks"] * BLOCK_TOKENS, read["failed"], read["wrong"]) == (fetched, 0, 0)
    second.ask([[7] * 40])  # vLLM sends events at the end of a step
    eventually(lambda: blocks_of(asked) <= announced(pair.router))
    assert pair.router.wrong == []
    # It computed the last eight tokens only, so the next time everything is here.
    assert second.ask(asked) == (answers, [WHOLE] * PROMPTS)
    assert second.statistics["cluster"]["read_in_all"]["blocks"] * BLOCK_TOKENS == fetched
    eventually(first.is_idle)
    eventually(second.is_idle)


def test_an_engine_that_was_killed_gets_it_again(pair: Pair) -> None:
    """After `kill -9` of all its processes an engine that starts without blocks hits its peer's.

    Its keys come from the file of FLEXKV_CONFIG_PATH now.
    """
    asked = prompts(1)
    answers, _ = pair.first.ask(asked)
    pair.second.kill()
    pair.second = pair.start(by_file=True).ready()
    pair.second.knows(pair.first)
    assert pair.second.ask(asked) == (answers, [WHOLE] * PROMPTS)
    assert pair.second.statistics["cluster"]["read_in_all"]["failed"] == 0
    eventually(pair.first.is_idle)


def test_an_engine_computes_what_a_peer_that_is_killed_does_not_send(pair: Pair) -> None:
    """If the peer is killed while an engine waits for its blocks, answers are equal all the same.

    When the peer is back, without blocks, it hits what the engine has computed meanwhile.
    """
    first, second, asked = pair.first, pair.second, prompts(2)
    answers, _ = first.ask(asked)
    second.knows(first)
    server = first.server
    os.kill(server, signal.SIGSTOP)
    with ThreadPoolExecutor(1) as pool:
        asking = pool.submit(second.ask, asked)
        eventually(lambda: second.statistics["runs_in_flight"])
        os.kill(server, signal.SIGKILL)
        first.serve.kill()
        assert asking.result() == (answers, [0] * PROMPTS)
    wait_gone(server)
    assert second.statistics["cluster"]["read_in_all"]["failed"] > 0
    eventually(second.is_idle)

    pair.first = pair.start().ready()
    pair.first.knows(second)
    assert pair.first.ask(asked) == (answers, [WHOLE] * PROMPTS)
    eventually(second.is_idle)


@pytest.mark.parametrize("name", [case("gpt_oss")])
def test_an_engine_with_several_kv_groups_hits_what_another_one_has_computed(
    hybrids: Hybrids, redis: RedisServer, tmp_path: Path, name: str
) -> None:
    """A model with windows hits each prompt of its peer up to the last boundary, and is right."""
    keys = {
        "enable_p2p_cpu": True, "redis_port": redis.port, "redis_password": redis.password,
        "num_ssd_blocks": 0,
    }  # fmt: skip
    sizes: dict[str, Any] = {"conversations": PROMPTS, "turns": 1, "first_tokens": 300}
    folders = {called: tmp_path / called for called in ("without", "first", "second")}
    for folder in folders.values():
        folder.mkdir()
    without = hybrids.run(name, folders["without"], **sizes)
    plan = {**sizes, "connector": "own", "cache": keys, "settings": {"prefetch_stop": "complete"}}
    first = hybrids.start(name, folders["first"], **plan)
    told = first.told()
    check_sound(told)
    assert different(told["answers"], without["answers"]) == 0
    second = hybrids.run(name, folders["second"], meets=True, **plan)
    first.kill()
    wait_gone(told["server"]["pid"])
    check_sound(second)
    assert different(second["answers"], without["answers"]) == 0
    boundary = (sizes["first_tokens"] - 1) // BLOCK_TOKENS * BLOCK_TOKENS
    assert second["cached"] == [[boundary] * PROMPTS]
    fetched = second["server"]["statistics"]["routes"]["peer→host"]
    assert (fetched["blocks"] > 0, fetched["failed_ops"]) == (True, 0)
