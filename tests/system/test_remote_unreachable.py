"""What an object store that cannot be used is said to lack, by the errors of real requests."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest

from flexkv.common.errors import RemoteError
from flexkv.io.remote.open import open_store
from flexkv.io.remote.options import RemoteOptions
from tests.s3 import ACCESS_KEY, SECRET, S3Server

OPTIONS = RemoteOptions(deadline_s=30.0)
OWN = {"region": "us-east-1", "access_key_id": ACCESS_KEY, "secret_access_key": SECRET}
PLAIN_HTTP = b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"


@asynccontextmanager
async def answering(answer: bytes) -> AsyncIterator[str]:
    """Yield the address of a server that answers whatever it gets with the same bytes."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(1)
        writer.write(answer)
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        yield f"127.0.0.1:{server.sockets[0].getsockname()[1]}"


async def whys(url: str, custom: dict[str, Any]) -> set[str]:
    """Return why a head, a put and a listing of a store fail; all errors must be the store's."""
    store = open_store(url, {**OWN, **custom}, OPTIONS)

    async def listed() -> None:
        async for _ in store.pages("p/"):
            pass

    calls: list[Callable[[], Any]] = [
        lambda: store.head("p/x"), lambda: store.put("p/x", [b"1"]), listed,
    ]  # fmt: skip
    found = set()
    for call in calls:
        with pytest.raises(RemoteError) as caught:
            await call()
        assert SECRET not in str(caught.value)
        found.add(caught.value.why)
    return found


async def test_a_port_at_which_nothing_listens() -> None:
    """A connection that is refused is called that."""
    async with answering(b"") as address:
        pass
    assert await whys("s3://b", {"endpoint": f"http://{address}"}) == {
        "nothing listens at its address: the connection was refused"
    }


async def test_a_host_whose_name_has_no_address() -> None:
    """A name that cannot be resolved is called that; `.invalid` never can (RFC 2606)."""
    custom = {"endpoint": "http://store.invalid:1", "proxy_excludes": "store.invalid"}
    assert await whys("s3://b", custom) == {"the name of its host cannot be resolved"}


async def test_https_to_a_server_without_tls() -> None:
    """A server that does not speak TLS is not taken for one that is silent."""
    async with answering(PLAIN_HTTP) as address:
        assert await whys("s3://b", {"endpoint": address}) == {
            "it does not speak TLS: is its endpoint http:// and not https://?"
        }


async def test_a_server_that_does_not_speak_http() -> None:
    """Another service at the port is not taken for a store that is silent."""
    async with answering(b"SSH-2.0-OpenSSH\r\n") as address:
        assert await whys("s3://b", {"endpoint": f"http://{address}"}) == {
            "what listens at its address does not speak HTTP"
        }


async def test_a_bucket_that_is_not_there(s3: S3Server) -> None:
    """Puts and listings both say that there is no such bucket."""
    store = open_store("s3://no-such-bucket", s3.custom, OPTIONS)
    with pytest.raises(RemoteError, match="there is no such bucket"):
        await store.put("p/x", [b"1"])
    with pytest.raises(RemoteError, match="there is no such bucket"):
        await anext(aiter(store.pages("p/")))


async def test_a_machine_without_credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where nothing has credentials, the error says so, whatever the machine's role service says.

    The address of that service is a link's own; a proxy stands for it here, and refuses.
    """
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    for answer in (PLAIN_HTTP, PLAIN_HTTP.replace(b"400 Bad Request", b"403 Forbidden"), b"no\r\n"):
        async with answering(answer) as address:
            store = open_store("s3://b", {"proxy_url": f"http://{address}"}, OPTIONS)
            with pytest.raises(RemoteError, match="there are no credentials"):
                await store.head("p/x")
