"""Engines that share a bucket, and what happens to it meanwhile. `make test-s3` runs it on Ceph."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from random import Random
from typing import Any

import pytest

from flexkv.common.errors import TransferError
from flexkv.common.terms import Tier
from flexkv.io.remote.landing import OpenStore
from flexkv.io.remote.open import open_store
from flexkv.io.remote.options import RemoteOptions
from flexkv.testing.faulty_http import FaultyProxy, Message
from tests.remote_rigs import POOL
from tests.s3 import ACCESS_KEY, NEW_ACCESS_KEY, SECRET, S3Server

from .test_remote import BLOCKS, SPAN, TOKENS, WHOLE, Node, listed, prompt

ROOT = Path(__file__).parents[2]
SPANS = WHOLE // SPAN
PATIENT = RemoteOptions(deadline_s=30.0)
PATIENCE_S = 180.0
NAME = POOL.object_name(bytes(range(16)))
PARTS = [b"a" * 3_000_000, b"b" * 64]
WRITER = """
import asyncio, json, sys
from flexkv.io.remote.open import open_store
from flexkv.io.remote.options import RemoteOptions

url, name, custom = sys.argv[1:]
store = open_store(url, json.loads(custom), RemoteOptions(deadline_s=600.0))
asyncio.run(store.put(name, [b"a" * 3_000_000, b"b" * 64]))
"""


class Bucket:
    """A bucket of its own, as engines and the test reach it."""

    def __init__(self, server: S3Server) -> None:
        self.server, self.name = server, server.new_bucket()
        self.url = f"s3://{self.name}/kv"
        self.store: OpenStore = open_store(self.url, server.custom, PATIENT)

    def keys(self, custom: dict[str, Any] | None = None, **changes: Any) -> dict[str, Any]:
        """Return the keys of a remote tier in it, which is listed again and again."""
        custom = self.server.custom if custom is None else custom
        return {
            "remote_cache_path": self.url, "remote_config_custom": custom,
            "remote_list_per_s": 1000.0, **changes,
        }  # fmt: skip

    async def names(self) -> list[str]:
        """Return the names of all objects."""
        return [each.name async for page in self.store.pages("") for each in page]

    async def spans(self) -> list[str]:
        """Return the names of the spans, of whatever pool."""
        return [name for name in await self.names() if len(name.rpartition("/")[2]) == 32]

    async def remove(self) -> None:
        """Delete the bucket with all that is in it."""
        while names := await self.names():  # engines may be at work
            for name in names:
                await self.store.delete(name)
        self.server.request("DELETE", self.name)


@pytest.fixture
def bucket(s3: S3Server) -> Bucket:
    """Return a bucket of a real server."""
    return Bucket(s3)


# -- several engines ------------------------------------------------------------------------------


async def test_engines_that_ship_the_same_spans_make_one_object_each(bucket: Bucket) -> None:
    """Three engines store a prompt at once: each span is one object, and whoever asks gets it."""
    async with Node(bucket.keys()) as one, Node(bucket.keys()) as two, Node(bucket.keys()) as three:
        nodes = one, two, three
        await asyncio.gather(*(node.put(1) for node in nodes))
        assert len(await bucket.spans()) == SPANS
        assert sum(node.store.requests.existing for node in nodes) >= SPANS
        for node in nodes:
            node.manager.clear(Tier.HOST)
            assert await node.get(1) == WHOLE


async def test_reads_while_an_engine_collects(bucket: Bucket) -> None:
    """While spans over the budget are deleted, engines get right bytes, or fewer."""
    prompts, deleted = range(6), 4
    async with Node(bucket.keys()) as writer:
        for seed in prompts:
            await writer.put(seed)
    keys = bucket.keys(num_remote_blocks=(len(prompts) * SPANS // 2) * SPAN)
    async with Node(keys) as one, Node(keys) as two:
        nodes = one, two
        for node in nodes:
            await node.until(listed)
        while sum(node.store.collection.removed.evicted for node in nodes) < deleted:
            for node in nodes:
                node.manager.clear(Tier.HOST)
                await node.get(prompts[-1])
                await asyncio.sleep(0)  # a get that finds nothing does not wait for anything
        assert one.store.collection.is_collector != two.store.collection.is_collector
        two.manager.clear(Tier.HOST)
        loaded = sum([await two.get(seed) for seed in prompts])
        assert 0 < loaded <= (len(prompts) * SPANS - deleted) * SPAN


async def test_what_a_match_offers_is_there(bucket: Bucket) -> None:
    """What is only in the store is not offered; a span deleted meanwhile shortens a prefetch."""
    async with Node(bucket.keys()) as first:
        await first.put(1, SPAN)
        leading = await bucket.spans()
        await first.put(1)
    (last,) = set(await bucket.spans()) - set(leading)
    tokens = prompt(1, BLOCKS)
    async with Node(bucket.keys(remote_list_per_s=0)) as second:
        await second.until(listed)
        assert second.store.known_spans == SPANS
        assert second.manager.match(tokens).tokens == 0
        await bucket.store.delete(last)
        await second.manager.prefetch(tokens)
        assert second.manager.match(tokens).tokens == (WHOLE - SPAN) * TOKENS
        assert await second.get(1) == WHOLE - SPAN
        assert second.store.requests.missing == 1
        assert second.store.known_spans == SPANS - 1


# -- a writer that is killed ----------------------------------------------------------------------


@asynccontextmanager
async def narrow(port: int, let_through: int) -> AsyncIterator[tuple[int, asyncio.Event]]:
    """Yield a port that passes so many bytes on to a server, and an event set after them."""
    is_full = asyncio.Event()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        _, server = await asyncio.open_connection("127.0.0.1", port)
        try:
            server.write(await reader.readexactly(let_through))
            await server.drain()
            is_full.set()
            await reader.read()  # until the client ends: nothing is passed on any more
        finally:
            server.transport.abort()
            writer.transport.abort()

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as listening:
        yield listening.sockets[0].getsockname()[1], is_full


@pytest.mark.parametrize("let_through", [200, 100_000, 2_999_000])
async def test_a_writer_that_is_killed_leaves_no_part_of_an_object(
    bucket: Bucket, let_through: int
) -> None:
    """Wherever in a put a writer is killed, no object appears, and others can create it."""
    async with narrow(bucket.server.port, let_through) as (port, is_full):
        custom = json.dumps(bucket.server.custom_at(port))
        command = [sys.executable, "-c", WRITER, bucket.url, NAME, custom]
        with subprocess.Popen(command, cwd=ROOT) as writer:  # noqa: ASYNC220 -- begins, no more
            async with asyncio.timeout(PATIENCE_S):
                await is_full.wait()
            writer.kill()
    assert await bucket.names() == []
    with pytest.raises(FileNotFoundError):
        await bucket.store.head(NAME)
    assert await bucket.store.put(NAME, PARTS)
    assert await bucket.store.read(NAME) == b"".join(PARTS)


# -- a bucket that is gone, and credentials that expire -------------------------------------------


async def put_fails(node: Node, seed: int) -> None:
    """Put a prompt that reaches host memory, and not the store."""
    with pytest.raises(TransferError):
        await node.put(seed)
    assert await node.get(seed) == BLOCKS


async def test_a_bucket_that_is_gone_and_back(bucket: Bucket) -> None:
    """Without its bucket an engine serves from host memory; it shares again once that is back."""
    async with Node(bucket.keys()) as node:
        await node.put(1)
        await bucket.remove()
        await put_fails(node, 2)
        node.manager.clear(Tier.HOST)
        assert await node.get(1) == 0
        bucket.server.request("PUT", bucket.name)
        await stored_again(node, bucket)


async def stored_again(node: Node, bucket: Bucket) -> None:
    """Put prompts until their spans are in the bucket, and get them from there."""
    seed, before = 100, set(await bucket.spans())
    async with asyncio.timeout(PATIENCE_S):
        while len(set(await bucket.spans()) - before) < SPANS:
            seed += 1
            try:
                await node.put(seed)
            except TransferError:
                before = set(await bucket.spans())
    async with Node(bucket.keys()) as later:
        await later.until(listed)
        assert await later.get(seed) == WHOLE


class Gate(FaultyProxy):
    """A proxy that answers like a server for which all access keys but one have expired.

    Attributes:
        accepted: the access key that is still good.
    """

    accepted = ""

    def _fault_of(self, request: Message) -> tuple[str, Random, list[str]]:
        is_good = f"Credential={self.accepted}/".encode() in request.head
        return "" if is_good else "deny", Random(0), []


@asynccontextmanager
async def instance_role(keys: list[str]) -> AsyncIterator[int]:
    """Yield the port of a metadata service whose role has the last of some access keys."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        path = (await reader.readuntil(b"\r\n\r\n")).split(b" ", 2)[1].decode()
        ends = datetime.now(UTC) + timedelta(seconds=1)
        body = "a-role" if path.endswith("security-credentials/") else json.dumps({
            "AccessKeyId": keys[-1], "SecretAccessKey": SECRET, "Token": "",
            "Expiration": ends.isoformat(timespec="seconds").replace("+00:00", "Z"),
        })  # fmt: skip
        head = f"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: {len(body)}\r\n\r\n"
        writer.write((head + body).encode())
        await writer.drain()
        writer.close()

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as listening:
        yield listening.sockets[0].getsockname()[1]


async def test_credentials_that_expire_and_are_renewed(bucket: Bucket) -> None:
    """With expired credentials an engine serves from host memory; it uses new ones by itself."""
    keys = [ACCESS_KEY]
    async with instance_role(keys) as role, Gate(bucket.server.port, 1, ["deny"], 1.0) as gate:
        custom = {
            "endpoint": f"http://127.0.0.1:{gate.port}", "region": "us-east-1",
            "metadata_endpoint": f"http://127.0.0.1:{role}",
        }  # fmt: skip
        gate.accepted = ACCESS_KEY
        async with Node(bucket.keys(custom)) as node:
            await node.put(1)
            gate.accepted = "none"
            await put_fails(node, 2)
            gate.accepted = NEW_ACCESS_KEY
            keys.append(NEW_ACCESS_KEY)
            await stored_again(node, bucket)
