"""Tests that keys of prompts go to the server once, and are right over every connection."""

from __future__ import annotations

import os
import signal
from contextlib import suppress

import numpy as np
import psutil
import pytest

from flexkv.common.config import Settings
from flexkv.common.errors import ClosedError
from flexkv.common.request import Operation
from flexkv.server.client import Client
from flexkv.server.launch import LaunchedServer
from flexkv.server.prompts import Prompt, PromptPart
from flexkv.server.wire import Done, Match, Matched, Start, framed

from .conftest import MODEL, PER_BLOCK
from .fake_server import FakeServer
from .forked import forked_server
from .serving import BLOCKS, Instance, Peer, eventually

GROWTH_BYTES_MAX = 96 << 20
"""Twice the bytes that a server keeps for one client's prompts, plus the allocator's overhead."""


def grown(client: Client, prompt: Prompt, blocks: int) -> PromptPart:
    """Extend a prompt with the tokens 0, 1, 2, … if needed; return its first blocks."""
    tokens = np.arange(blocks * PER_BLOCK)
    if prompt.keys:
        client.extend(prompt, tokens[prompt.blocks * PER_BLOCK :])
    else:
        prompt.keys[:] = client.keys(tokens)
    return PromptPart(prompt, blocks)


def test_each_key_is_sent_once(settings: Settings) -> None:
    """A match sends all keys, and each later put only the last known key and the new ones."""
    server, client = FakeServer(settings), Client(settings, MODEL)
    try:
        eventually(lambda: (client.poll(), client.is_ready)[1])
        peer, prompt = server.next_peer(), client.new_prompt()
        client.ask(grown(client, prompt, 100))
        asked = server.hear(peer)
        assert (len(asked.keys), asked.known) == (101 * 16, 0)
        for blocks in (50, 100, 101, 103):
            part = grown(client, prompt, max(blocks, prompt.blocks))
            client.put(PromptPart(part.prompt, blocks), 0, np.arange(blocks), 0)
            client.flush()
            put = server.hear(peer)
            assert isinstance(put, Start)
            assert put.prompt == asked.prompt
            new = max(0, blocks + 1 - max(101, put.known))
            assert len(put.keys) == (1 + new) * 16
            assert put.keys == bytes(prompt.keys[(put.known - 1) * 16 : (blocks + 1) * 16])
    finally:
        client.close()
        server.close()


@pytest.mark.parametrize("how", ["ends", "killed", "cut"])
def test_a_new_connection_means_the_same_blocks(settings: Settings, how: str) -> None:
    """After a lost connection or a server's restart keys are sent anew; blocks stay the same."""
    server = forked_server(settings)
    instance = Instance(settings)
    instance.begin()
    client, prompt = instance.client, instance.client.new_prompt()
    before = instance.content(range(BLOCKS))
    try:
        number = client.put(grown(client, prompt, 4), 0, np.arange(4), client.generation)
        instance.agents[0].ready([number])
        assert instance.end_of(number).moved == 4
        if how == "cut":
            client.give_up("the test wants it")
            client._reconnects._due_s = 0.0
        else:
            if how == "killed":
                os.kill(server.pid, signal.SIGKILL)
                eventually(lambda: server.has_ended)
            server.close()
            assert server.exit_status == (how == "killed")
            server = forked_server(settings)
        eventually(lambda: (client.poll(), not client.is_ready)[1] or how == "cut")
        client._reconnects._due_s = 0.0
        instance.wait_ready()
        number = client.put(grown(client, prompt, BLOCKS), 0, np.arange(BLOCKS), client.generation)
        instance.agents[0].ready([number])
        assert instance.end_of(number).status == "success"
        part = PromptPart(prompt, BLOCKS)
        assert client.match(part).blocks == BLOCKS
        number = client.get(part, 0, np.arange(20, 20 + BLOCKS), held=0, when_ready=False)
        assert instance.end_of(number).moved == BLOCKS
        np.testing.assert_array_equal(instance.content(range(20, 20 + BLOCKS)), before)
        assert client.match(instance.keys(0)).blocks == BLOCKS  # by all keys, sent in full
    finally:
        instance.close()
        server.close()
    assert server.exit_status == 0


def test_keys_that_do_not_fit_end_the_connection(
    settings: Settings, launched: LaunchedServer
) -> None:
    """Keys that do not fit the prompt end only that connection; other clients are served."""
    for message in (
        Match(1, b"k" * 32, prompt=3, known=1),
        Start(1, "put", b"k" * 32, 0, b"", 0, prompt=3, known=2),
        Match(1, b"k" * (2 << 20), prompt=3),
    ):
        peer = Peer(settings, "client")
        peer.connected.socket.sendall(framed(message))
        with pytest.raises((OSError, ClosedError)):
            peer.hear(Done)
        peer.close()
    instance = Instance(settings)
    instance.begin()
    assert instance.request(Operation.PUT, 1, range(BLOCKS)).moved == BLOCKS
    instance.close()


def test_what_a_client_makes_the_server_keep_is_bounded(
    settings: Settings, launched: LaunchedServer
) -> None:
    """A client that sends prompt after prompt and drops none is disconnected."""
    process = psutil.Process(launched.pid)
    before = process.memory_info().rss
    peer, kept = Peer(settings, "client"), 0
    with suppress(OSError, ClosedError):
        for number in range(1, 1000):
            peer.say(Match(number, os.urandom(256 << 10), prompt=number))
            peer.hear(Matched)
            kept = number
    assert 64 < kept < 256
    assert process.memory_info().rss - before < GROWTH_BYTES_MAX
    peer.close()
