"""Programs that exit with requests to a store in flight: `python remote_exits.py CASE`."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
from collections.abc import Awaitable, Callable
from contextlib import suppress

from flexkv.io.remote.landing import OpenStore
from flexkv.io.remote.open import open_store
from flexkv.io.remote.options import RemoteOptions

REQUESTS = 200
"""So many that some have not ended when the interpreter does."""


def begun(store: OpenStore) -> list[asyncio.Future[object]]:
    """Begin requests that get no answer."""
    get = store.get  # type: ignore[attr-defined]
    gets = [get(f"get{number}", 0, 100) for number in range(REQUESTS)]
    puts = [store.put(f"put{number}", [bytes(1 << 16)]) for number in range(REQUESTS // 4)]
    return [*gets, *map(asyncio.ensure_future, puts)]


async def left(store: OpenStore) -> None:
    """Close the store after its requests were cancelled, as an engine does."""
    requests = begun(store)
    await asyncio.sleep(0.2)
    for request in requests:
        request.cancel()
    del request, requests
    await store.leave()
    store.close()


async def not_closed(store: OpenStore) -> None:
    """End the loop, which cancels what waits, and close nothing."""
    begun(store)
    await asyncio.sleep(0.2)


async def interrupted(store: OpenStore) -> None:
    """End by ctrl-C."""
    requests = begun(store)
    asyncio.get_running_loop().call_later(0.2, os.kill, os.getpid(), signal.SIGINT)
    await asyncio.wait(requests)


CASES: dict[str, Callable[[OpenStore], Awaitable[None]]] = {
    work.__name__: work for work in (left, not_closed, interrupted)
}


async def main(name: str, port: int) -> None:
    """Run a case over a server that never answers."""
    custom = {"endpoint": f"http://127.0.0.1:{port}", "region": "us-east-1",
              "access_key_id": "a", "secret_access_key": "b"}  # fmt: skip
    await CASES[name](open_store("s3://bucket/kv", custom, RemoteOptions(deadline_s=2.0)))


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # background jobs ignore SIGINT
    # Nobody accepts a connection, but the kernel does, until the process ends.
    listening = socket.create_server(("127.0.0.1", 0), backlog=2 * REQUESTS).detach()
    with socket.socket(fileno=os.dup(listening)) as silent, suppress(KeyboardInterrupt):
        asyncio.run(main(sys.argv[1], silent.getsockname()[1]))
